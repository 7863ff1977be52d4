# Training-free compression of pretrained models: fetch, calibrate once, then one job a method for all its reductions.


rule text:
    input:
        lambda wildcards: local_text_files(wildcards.name),
    output:
        f"{DATA}/texts/{{name}}.json",
    log:
        f"{LOGS}/texts/{{name}}.log",
    priority: place_of("text")
    conda:
        ENVIRONMENT
    resources:
        **asks_for("text"),
    params:
        spec=lambda wildcards: as_json(inputs.text_spec(config, wildcards.name)),
        code=meaning("masa.data.excerpts"),
    message:
        "Text {wildcards.name}"
    shell:
        "masa text {wildcards.name:q} --spec {params.spec:q} --out {output:q} --log {log:q}"


rule pretrained:
    input:
        lambda wildcards: local_model_files(wildcards.model),
    output:
        f"{RESULTS}/pretrained/{{model}}/manifest.json",
    log:
        f"{LOGS}/pretrained/{{model}}.log",
    priority: place_of("pretrained")
    conda:
        ENVIRONMENT
    resources:
        **asks_for("pretrained"),
    params:
        spec=lambda wildcards: as_json(inputs.pretrained_spec(config, wildcards.model)),
        code=meaning("masa.models.pretrained"),
        out=lambda wildcards, output: Path(output[0]).parent,
    message:
        "Fetching {wildcards.model}"
    shell:
        "masa pretrained {wildcards.model:q} --spec {params.spec:q} --out {params.out:q} --log {log:q}"


rule calibrate:
    input:
        model=rules.pretrained.output[0],
        text=lambda wildcards: f"{DATA}/texts/{config['calibrations'][wildcards.name]['text']}.json",
    output:
        f"{RESULTS}/compression/{{model}}/calibrations/{{name}}/calibration.json",
    log:
        f"{LOGS}/calibrate/{{model}}/{{name}}.log",
    priority: place_of("calibrate")
    conda:
        ENVIRONMENT
    threads: config["compression"]["threads"]
    resources:
        **asks_for("calibrate"),
    params:
        code=meaning("masa.compression.calibration.collect"),
        model=lambda wildcards, input: Path(input.model).parent,
        out=lambda wildcards, output: Path(output[0]).parent,
        threads=config["compression"]["threads"],  # the configuration's, whatever --cores says
        size=lambda wildcards: [
            f"--{key.replace('_', '-')}={value}"
            for key, value in sorted(config["calibrations"][wildcards.name].items())
            if key != "text"
        ],
    message:
        "Calibration {wildcards.name} of {wildcards.model}"
    shell:
        "masa calibrate {params.model:q} --text {input.text:q} {params.size:q} --threads {params.threads:q} --out {params.out:q}"
        " --gpus {resources.gpu_percent:q}% --log {log:q} > /dev/null"


rule compress:
    input:
        model=rules.pretrained.output[0],
        texts=expand(
            f"{DATA}/texts/{{name}}.json",
            name=config["compression"]["evaluation"]["texts"],
        ),
        benchmarks=rules.benchmarks.output[0],
        calibration=calibration_of,
        calibration_text=calibration_text_of,
    output:
        f"{RESULTS}/compression/{{model}}/{{name}}/manifest.json",
    log:
        f"{LOGS}/compress/{{model}}/{{name}}.log",
    priority: place_of("compress")
    conda:
        ENVIRONMENT
    threads: config["compression"]["threads"]
    resources:
        **asks_for("compress"),
    params:
        spec=lambda wildcards: as_json(
            compressions.run_spec(config, wildcards.model, wildcards.name)
        ),
        code=lambda wildcards: meaning(
            *modules(config["compressions"][wildcards.name]["method"])
        ),
        model=lambda wildcards, input: Path(input.model).parent,
        benchmarks=lambda wildcards, input: Path(input.benchmarks).parent,
        calibration=lambda wildcards, input: [
            f"--calibration={Path(file).parent}" for file in input.calibration
        ]
        + [f"--calibration-text={file}" for file in input.calibration_text],
        out=lambda wildcards, output: Path(output[0]).parent,
    message:
        "Compressing {wildcards.model} by {wildcards.name}"
    shell:
        "masa sweep {wildcards.model:q}/{wildcards.name:q} --spec {params.spec:q} --model {params.model:q}"
        " {params.calibration:q} --texts {input.texts:q} --benchmarks {params.benchmarks:q} --out {params.out:q}"
        " --gpus {resources.gpu_percent:q}% --log {log:q}"
