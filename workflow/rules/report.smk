# Each table and figure is made by a rule of its own, under results/parts; results/tables and results/figures gather
# them. The short rules at the end (`snakemake table1`) stand for one artefact each.


rule table:
    input:
        table_inputs,
    output:
        f"{PARTS}/tables/{{name}}.csv",
    log:
        f"{LOGS}/tables/{{name}}.log",
    priority: place_of("table")
    conda:
        ENVIRONMENT
    resources:
        **asks_for("table"),
    params:
        spec=lambda wildcards: as_json(artefacts.table_spec(config, wildcards.name)),
        code=lambda wildcards: meaning(
            "masa.report.own_tables"
            if wildcards.name in OWN_INPUTS
            else "masa.report.tables"
        ),
        results=lambda wildcards: RESULTS,
        out=lambda wildcards, output: Path(output[0]).parent,
    message:
        "Table {wildcards.name}"
    shell:
        "masa tables {wildcards.name:q} --spec {params.spec:q} --results {params.results:q} --out {params.out:q} --log {log:q}"


rule figure:
    input:
        lambda wildcards: made_from(config["figures"][wildcards.name]),
    output:
        f"{PARTS}/figures/{{name}}.png",
        f"{PARTS}/figures/{{name}}.pdf",
    log:
        f"{LOGS}/figures/{{name}}.log",
    priority: place_of("figure")
    conda:
        ENVIRONMENT
    resources:
        **asks_for("figure"),
    params:
        spec=lambda wildcards: as_json(
            artefacts.artefact_spec(config, "figures", wildcards.name)
        ),
        code=meaning("masa.report.figures"),
        results=lambda wildcards: RESULTS,
        out=lambda wildcards, output: Path(output[0]).parent,
    message:
        "Figure {wildcards.name}"
    shell:
        "masa figures {wildcards.name:q} --spec {params.spec:q} --results {params.results:q} --out {params.out:q} --log {log:q}"


rule tables:
    input:
        expand(f"{PARTS}/tables/{{name}}.csv", name=TABLES),
    output:
        report(
            directory(f"{RESULTS}/tables"),
            patterns=["{name}.csv"],
            category="Tables",
            caption="../report/table.rst",
            labels={"table": "{name}"},
        ),
    log:
        f"{LOGS}/tables.log",
    conda:
        ENVIRONMENT
    params:
        names=TABLES,
        parts=lambda wildcards, input: Path(input[0]).parent,
    message:
        "All tables: {output}"
    shell:
        "mkdir -p {output:q} && for name in {params.names:q}; do cp {params.parts:q}/$name.* {output:q}/ ; done 2> {log:q}"


rule figures:
    input:
        expand(f"{PARTS}/figures/{{name}}.png", name=FIGURES),
    output:
        report(
            directory(f"{RESULTS}/figures"),
            patterns=["{name}.png"],
            category="Figures",
            caption="../report/figure.rst",
            labels={"figure": "{name}"},
        ),
    log:
        f"{LOGS}/figures.log",
    conda:
        ENVIRONMENT
    params:
        names=FIGURES,
        parts=lambda wildcards, input: Path(input[0]).parent,
    message:
        "All figures: {output}"
    shell:
        "mkdir -p {output:q} && for name in {params.names:q}; do cp {params.parts:q}/$name.* {output:q}/ ; done 2> {log:q}"


rule report:
    input:
        f"{RESULTS}/tables",
        f"{RESULTS}/figures",
    output:
        report(
            f"{RESULTS}/report.html",
            category="Overview",
            caption="../report/page.rst",
            labels={"page": "all results"},
        ),
    log:
        f"{LOGS}/report.log",
    conda:
        ENVIRONMENT
    params:
        spec=as_json(config),
        code=lambda wildcards: meaning("masa.report.page.build"),
        assets=assets.digest(),
        results=lambda wildcards: RESULTS,
        overlays=["--configfile", *OVERLAYS] if OVERLAYS else [],
    message:
        "All results as one page: {output}"
    shell:
        "masa report --spec {params.spec:q} {params.overlays:q} --results {params.results:q} --out {output:q} --log {log:q}"


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


for artefact, said in LACKING.items():

    rule:
        name:
            artefact
        input:
            refusing(said),
