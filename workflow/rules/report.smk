# Each table and figure is made by a rule of its own, under results/parts; results/tables and results/figures gather
# them. The short rules at the end (`snakemake table1`) stand for one artefact each.


def table_inputs(wildcards):
    if wildcards.name == "runs":
        return expand(
            f"{RESULTS}/evaluations/{{run}}/metrics.json",
            run=experiments.all_runs(config),
        )
    if wildcards.name == "throughput":
        return expand(
            f"{RESULTS}/throughput/{{scale}}.json", scale=config["throughput"]["scales"]
        )
    if wildcards.name == "parameters":
        return [f"{RESULTS}/parameters.json"]
    return made_from(config["tables"][wildcards.name])


rule table:
    input:
        table_inputs,
    output:
        f"{PARTS}/tables/{{name}}.csv",
    log:
        f"{LOGS}/tables/{{name}}.log",
    params:
        spec=lambda wildcards: as_json(cli.table_spec(config, wildcards.name)),
        code=meaning("report.tables"),
    message:
        "Table {wildcards.name}"
    shell:
        "masa table {wildcards.name} --spec {params.spec:q} --results {RESULTS} --out {PARTS}/tables --log {log}"


rule figure:
    input:
        lambda wildcards: made_from(config["figures"][wildcards.name]),
    output:
        f"{PARTS}/figures/{{name}}.png",
        f"{PARTS}/figures/{{name}}.pdf",
    log:
        f"{LOGS}/figures/{{name}}.log",
    params:
        spec=lambda wildcards: as_json(
            experiments.artefact_spec(config, "figures", wildcards.name)
        ),
        code=meaning("report.figures"),
    message:
        "Figure {wildcards.name}"
    shell:
        "masa figure {wildcards.name} --spec {params.spec:q} --results {RESULTS} --out {PARTS}/figures --log {log}"


rule tables:
    input:
        expand(f"{PARTS}/tables/{{name}}.csv", name=TABLES),
    output:
        directory(f"{RESULTS}/tables"),
    log:
        f"{LOGS}/tables.log",
    params:
        names=TABLES,
    message:
        "All tables: {output}"
    shell:
        "mkdir -p {output} && for name in {params.names}; do cp {PARTS}/tables/$name.* {output}/ ; done 2> {log}"


rule figures:
    input:
        expand(f"{PARTS}/figures/{{name}}.png", name=FIGURES),
    output:
        directory(f"{RESULTS}/figures"),
    log:
        f"{LOGS}/figures.log",
    params:
        names=FIGURES,
    message:
        "All figures: {output}"
    shell:
        "mkdir -p {output} && for name in {params.names}; do cp {PARTS}/figures/$name.* {output}/ ; done 2> {log}"


for artefact in TABLES:

    rule:
        name:
            artefact
        input:
            f"{PARTS}/tables/{artefact}.csv",


for artefact in FIGURES:

    rule:
        name:
            artefact
        input:
            f"{PARTS}/figures/{artefact}.png",
