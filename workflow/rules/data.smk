rule benchmarks:
    input:
        benchmark_files(),
    output:
        f"{DATA}/benchmarks/manifest.json",
    log:
        f"{LOGS}/benchmarks.log",
    priority: place_of("benchmarks")
    conda:
        ENVIRONMENT
    resources:
        **asks_for("benchmarks"),
    params:
        spec=as_json(inputs.benchmarks_spec(config)),
        code=meaning("masa.data.benchmarks"),
        out=lambda wildcards, output: Path(output[0]).parent,
    message:
        "Fetching the benchmark data"
    shell:
        "masa fetch --spec {params.spec:q} --out {params.out:q} --log {log:q}"


rule tokenizer:
    input:
        corpus_files(),
    output:
        f"{DATA}/tokenizer/manifest.json",
    log:
        f"{LOGS}/tokenizer.log",
    priority: place_of("tokenizer")
    conda:
        ENVIRONMENT
    resources:
        **asks_for("tokenizer"),
    params:
        spec=as_json(inputs.data_spec(config)),
        code=meaning("masa.data.tokenize"),
        out=lambda wildcards, output: Path(output[0]).parent,
    message:
        "Training or fetching the tokenizer"
    shell:
        "masa tokenizer --spec {params.spec:q} --out {params.out:q} --log {log:q}"


rule tokenize:
    input:
        rules.tokenizer.output,
        corpus_files(),
    output:
        f"{DATA}/tokens/{{scale}}/manifest.json",
    log:
        f"{LOGS}/tokenize/{{scale}}.log",
    priority: place_of("tokenize")
    conda:
        ENVIRONMENT
    resources:
        **asks_for("tokenize"),
    params:
        spec=as_json(inputs.data_spec(config)),
        tokens=lambda wildcards: experiments.tokens_needed(config, wildcards.scale),
        code=meaning("masa.data.tokenize"),
        tokenizer=lambda wildcards, input: Path(input[0]).parent,
        out=lambda wildcards, output: Path(output[0]).parent,
    message:
        "Packing {params.tokens} tokens for {wildcards.scale}"
    shell:
        "masa tokenize --spec {params.spec:q} --tokenizer {params.tokenizer:q} --tokens {params.tokens:q}"
        " --out {params.out:q} --log {log:q}"
