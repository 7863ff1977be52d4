rule pretrain:
    input:
        tokens_of,
    output:
        f"{RESULTS}/runs/{{run}}/manifest.json",
    log:
        f"{LOGS}/pretrain/{{run}}.log",
    priority: 10  # the longest jobs first
    threads: training_threads
    resources:
        gpu=1,
    params:
        spec=run_spec,
        code=meaning("training"),
        tokens=lambda wildcards, input: Path(input[0]).parent,
        out=lambda wildcards, output: Path(output[0]).parent,
    message:
        "Training {wildcards.run}"
    shell:
        "masa pretrain --spec {params.spec:q} --tokens {params.tokens} --out {params.out} --log {log}"
