rule evaluate:
    input:
        run=rules.pretrain.output[0],
        tokens=tokens_of,
        tokenizer=rules.tokenizer.output[0],
        benchmarks=rules.benchmarks.output[0],
    output:
        f"{RESULTS}/evaluations/{{run}}/metrics.json",
        f"{RESULTS}/evaluations/{{run}}/lm_eval.json",
        f"{RESULTS}/evaluations/{{run}}/weights.json",
    log:
        f"{LOGS}/evaluate/{{run}}.log",
    threads: training_threads
    resources:
        gpu=1,
    params:
        spec=as_json(config["evaluation"]),
        code=meaning("evaluation"),
        run=lambda wildcards, input: Path(input.run).parent,
        tokens=lambda wildcards, input: Path(input.tokens).parent,
        out=lambda wildcards, output: Path(output[0]).parent,
    message:
        "Evaluating {wildcards.run}"
    shell:
        "masa evaluate {params.run} --spec {params.spec:q} --tokens {params.tokens} --tokenizer {DATA}/tokenizer"
        " --benchmarks {DATA}/benchmarks --out {params.out} --log {log}"


rule time_methods:
    output:
        f"{RESULTS}/throughput/{{scale}}.json",
    log:
        f"{LOGS}/throughput/{{scale}}.log",
    threads: workflow.cores  # the machine to itself: what it measures is time
    resources:
        gpu=1,
    params:
        spec=lambda wildcards: as_json(cli.throughput_spec(config, wildcards.scale)),
        code=meaning("throughput"),
    message:
        "Timing all methods at {wildcards.scale}"
    shell:
        "masa throughput --spec {params.spec:q} --out {output} --log {log}"


rule count_parameters:
    output:
        f"{RESULTS}/parameters.json",
    log:
        f"{LOGS}/parameters.log",
    params:
        spec=as_json(cli.parameters_spec(config)),
        code=meaning("accounting"),
    message:
        "Counting parameters"
    shell:
        "masa parameters --spec {params.spec:q} --out {output} --log {log}"
