rule pretrain:
    input:
        lambda wildcards: data_of(wildcards.run),
    output:
        f"{RESULTS}/runs/{{run}}/manifest.json",
    log:
        f"{LOGS}/pretrain/{{run}}.log",
    priority: place_of("pretrain")
    conda:
        ENVIRONMENT
    threads: lambda wildcards: threads_of(wildcards.run)
    resources:
        **asks_for("pretrain"),
    params:
        spec=run_spec,
        code=lambda wildcards: meaning(kind_of(wildcards.run).training),
        verb=lambda wildcards: kind_of(wildcards.run).verb,
        kind=lambda wildcards: kind_of(wildcards.run).data,
        data=lambda wildcards, input: Path(input[0]).parent,
        out=lambda wildcards, output: Path(output[0]).parent,
    message:
        "Training {wildcards.run}"
    shell:
        "masa {params.verb:q} --spec {params.spec:q} --{params.kind:q} {params.data:q} --out {params.out:q}"
        " --restart changed --gpus {resources.gpu_percent:q}% --log {log:q}"
