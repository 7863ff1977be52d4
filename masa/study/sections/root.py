"""The whole configuration as one class."""

from __future__ import annotations

from masa.data.box_spec import Boxes
from masa.data.image_sets import Images
from masa.settings import Directory, Name, Section, key
from masa.study.sections import artefacts, compression, data, evaluation, training


class Configuration(Section):
    """masa configuration"""

    results: Directory = key("Directory of everything that the workflow makes.")
    cache: Directory = key("Directory of downloads, kept between runs.")
    data: data.Data
    scales: dict[Name, training.Scale | None] = key(
        "Model sizes: name -> compare_with, model, training (overrides of the training section). null removes one."
    )
    training: training.Training
    images: dict[Name, Images] = key("Image data: name -> data set and source.")
    boxes: dict[Name, Boxes] = key("Images with boxes, for detectors: name -> data set and source.")
    vision_scales: dict[Name, training.VisionScale | None] = key(
        "Sizes of Vision Transformers and detectors: name -> data, model and recipe. null removes one."
    )
    vision_evaluation: evaluation.VisionEvaluation
    evaluation: evaluation.Evaluation
    throughput: evaluation.Throughput
    parameters: evaluation.Parameters
    grids: dict[Name, artefacts.Grid] = key(
        "name -> what an artefact of this grid is made for: scales and seeds, or pretrained models and reductions."
    )
    experiments: dict[Name, artefacts.Experiment] = key("name -> label and sharing spec.")
    tables: dict[Name, artefacts.Table | None] = key(
        "name -> title, grid, experiments and the paper's file. null removes one."
    )
    figures: dict[Name, artefacts.Figure | None] = key("name -> title, kind, grid and experiments. null removes one.")
    first: list[Name] = key(
        "Tables and figures whose runs go before all others, in this order: the first of them stands long before the "
        "whole is done.",
        [],
    )
    claims: dict[Name, artefacts.Claim | None] = key(
        "What the paper claims, judged in the table claims by one rule: name -> contrast of experiments. null removes "
        "one."
    )
    plan: evaluation.Plan = key("What runs will cost (masa plan), and what jobs ask a cluster for.", None)
    pretrained: dict[Name, data.Pretrained | None] = key("Pretrained models: name -> source. null removes one.")
    texts: dict[Name, data.Text] = key("Small sets of documents for calibration and perplexity: name -> source.")
    calibrations: dict[Name, compression.Calibration] = key(
        "Calibration statistics: name -> text and size. All methods that name one share it."
    )
    compressions: dict[Name, compression.Compression] = key("Named compressions: name -> label and method.")
    compression: compression.CompressionSettings
