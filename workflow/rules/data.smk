rule benchmarks:
    output:
        f"{DATA}/benchmarks/manifest.json",
    log:
        f"{LOGS}/benchmarks.log",
    params:
        spec=as_json(cli.benchmarks_spec(config)),
        code=meaning("benchmarks"),
    message:
        "Fetching the benchmark data"
    shell:
        "masa fetch --spec {params.spec:q} --out {DATA}/benchmarks --log {log}"


rule tokenizer:
    input:
        corpus_files(),
    output:
        f"{DATA}/tokenizer/manifest.json",
    log:
        f"{LOGS}/tokenizer.log",
    params:
        spec=as_json(cli.data_spec(config)),
        code=meaning("text"),
    message:
        "Training or fetching the tokenizer"
    shell:
        "masa tokenizer --spec {params.spec:q} --out {DATA}/tokenizer --log {log}"


rule tokenize:
    input:
        rules.tokenizer.output,
        corpus_files(),
    output:
        f"{DATA}/tokens/{{scale}}/manifest.json",
    log:
        f"{LOGS}/tokenize/{{scale}}.log",
    params:
        spec=as_json(cli.data_spec(config)),
        tokens=lambda wildcards: experiments.tokens_needed(config, wildcards.scale),
        code=meaning("text"),
    message:
        "Packing {params.tokens} tokens for {wildcards.scale}"
    shell:
        "masa tokenize --spec {params.spec:q} --tokenizer {DATA}/tokenizer --tokens {params.tokens}"
        " --out {DATA}/tokens/{wildcards.scale} --log {log}"
