rule evaluate:
    input:
        run=f"{RESULTS}/runs/{{language_run}}/manifest.json",
        tokens=lambda wildcards: data_of(wildcards.language_run),
        tokenizer=rules.tokenizer.output[0],
        benchmarks=rules.benchmarks.output[0],
    output:
        f"{RESULTS}/evaluations/{{language_run}}/metrics.json",
        f"{RESULTS}/evaluations/{{language_run}}/lm_eval.json",
        f"{RESULTS}/evaluations/{{language_run}}/weights.json",
    log:
        f"{LOGS}/evaluate/{{language_run}}.log",
    priority: place_of("evaluate")
    conda:
        ENVIRONMENT
    threads: lambda wildcards: threads_of(wildcards.language_run)
    resources:
        **asks_for("evaluate"),
    params:
        spec=as_json(config["evaluation"]),
        code=meaning("masa.evaluation.language"),
        run=lambda wildcards, input: Path(input.run).parent,
        tokens=lambda wildcards, input: Path(input.tokens).parent,
        tokenizer=lambda wildcards, input: Path(input.tokenizer).parent,
        benchmarks=lambda wildcards, input: Path(input.benchmarks).parent,
        out=lambda wildcards, output: Path(output[0]).parent,
    message:
        "Evaluating {wildcards.language_run}"
    shell:
        "masa evaluate {params.run:q} --spec {params.spec:q} --tokens {params.tokens:q} --tokenizer {params.tokenizer:q}"
        " --benchmarks {params.benchmarks:q} --out {params.out:q} --gpus {resources.gpu_percent:q}% --log {log:q}"


rule time_methods:
    output:
        f"{RESULTS}/throughput/{{scale}}.json",
    log:
        f"{LOGS}/throughput/{{scale}}.log",
    priority: place_of("time_methods")
    conda:
        ENVIRONMENT
    threads: MACHINE  # to itself: what it measures is time
    resources:
        **asks_for("time_methods"),
    params:
        spec=lambda wildcards: as_json(inputs.throughput_spec(config, wildcards.scale)),
        code=meaning("masa.training.throughput"),
    message:
        "Timing all methods at {wildcards.scale}"
    shell:
        "masa throughput --spec {params.spec:q} --out {output:q} --log {log:q}"


rule count_parameters:
    output:
        f"{RESULTS}/parameters.json",
    log:
        f"{LOGS}/parameters.log",
    priority: place_of("count_parameters")
    conda:
        ENVIRONMENT
    resources:
        **asks_for("count_parameters"),
    params:
        spec=as_json(inputs.parameters_spec(config)),
        code=meaning("masa.study.accounting"),
    message:
        "Counting parameters"
    shell:
        "masa parameters --spec {params.spec:q} --out {output:q} --log {log:q}"
