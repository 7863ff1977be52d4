# Vision: images or boxes once for all runs of a data set; training is rule pretrain, as of language models.


rule images:
    input:
        lambda wildcards: local_image_files("images", wildcards.name),
    output:
        f"{DATA}/images/{{name}}/manifest.json",
    log:
        f"{LOGS}/images/{{name}}.log",
    priority: place_of("images")
    conda:
        ENVIRONMENT
    resources:
        **asks_for("images"),
    params:
        spec=lambda wildcards: as_json(
            inputs.vision_data_spec(config, "images", wildcards.name)
        ),
        code=meaning("masa.data.images"),
        out=lambda wildcards, output: Path(output[0]).parent,
    message:
        "Images of {wildcards.name}"
    shell:
        "masa images --spec {params.spec:q} --out {params.out:q} --log {log:q}"


rule boxes:
    input:
        lambda wildcards: local_image_files("boxes", wildcards.name),
    output:
        f"{DATA}/boxes/{{name}}/manifest.json",
    log:
        f"{LOGS}/boxes/{{name}}.log",
    priority: place_of("boxes")
    conda:
        ENVIRONMENT
    resources:
        **asks_for("boxes"),
    params:
        spec=lambda wildcards: as_json(
            inputs.vision_data_spec(config, "boxes", wildcards.name)
        ),
        code=meaning("masa.data.boxes"),
        out=lambda wildcards, output: Path(output[0]).parent,
    message:
        "Boxes of {wildcards.name}"
    shell:
        "masa boxes --spec {params.spec:q} --out {params.out:q} --log {log:q}"


rule evaluate_vision:
    input:
        run=f"{RESULTS}/runs/{{vision_run}}/manifest.json",
        data=lambda wildcards: data_of(wildcards.vision_run),
    output:
        f"{RESULTS}/evaluations/{{vision_run}}/metrics.json",
        f"{RESULTS}/evaluations/{{vision_run}}/weights.json",
        f"{RESULTS}/evaluations/{{vision_run}}/examples.png",
    log:
        f"{LOGS}/evaluate/{{vision_run}}.log",
    priority: place_of("evaluate_vision")
    conda:
        ENVIRONMENT
    threads: lambda wildcards: threads_of(wildcards.vision_run)
    resources:
        **asks_for("evaluate_vision"),
    params:
        spec=as_json(config["vision_evaluation"]),
        code=lambda wildcards: meaning(kind_of(wildcards.vision_run).evaluation),
        kind=lambda wildcards: kind_of(wildcards.vision_run).data,
        run=lambda wildcards, input: Path(input.run).parent,
        data=lambda wildcards, input: Path(input.data).parent,
        out=lambda wildcards, output: Path(output[0]).parent,
    message:
        "Evaluating {wildcards.vision_run}"
    shell:
        "masa evaluate {params.run:q} --spec {params.spec:q} --{params.kind:q} {params.data:q} --out {params.out:q}"
        " --gpus {resources.gpu_percent:q}% --log {log:q}"
