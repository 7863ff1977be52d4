"""What the configuration says is what is built: all sizes of a model, read off its own tensors, against its config."""

import pytest
import torch

from masa.models import detector, language, timm_vit, vit, yolos

SHARING = {"method": "vanilla"}
PAIRS = [(width, wide) for width in range(8, 97, 8) for wide in range(width // 2, 4 * width, 13)]
"""Widths and FFN widths, few of which divide each other."""


def of_vit(model):
    """Sizes of timm's VisionTransformer."""
    blocks, patches = model.blocks, model.patch_embed.proj
    positions = model.pos_embed.shape[1] - model.num_prefix_tokens
    return {
        "num_layers": len(blocks),
        "hidden_size": one(block.attn.qkv.in_features for block in blocks),
        "num_attention_heads": one(block.attn.num_heads for block in blocks),
        "intermediate_size": one(
            n for block in blocks for n in (block.mlp.fc1.out_features, block.mlp.fc2.in_features)
        ),
        "patch_size": one(patches.kernel_size + patches.stride),
        "image_size": int(positions**0.5) * patches.stride[0],
        "channels": patches.in_channels,
        "num_classes": model.head.out_features,
    }


def of_yolos(model):
    layers, embeddings = model.vit.encoder.layer, model.vit.embeddings
    patches = embeddings.patch_embeddings.projection
    positions = embeddings.position_embeddings.shape[1] - 1 - embeddings.detection_tokens.shape[1]
    attention = [layer.attention.attention for layer in layers]
    return {
        "num_layers": len(layers),
        "hidden_size": one(a.query.in_features for a in attention),
        "num_attention_heads": one(a.num_attention_heads for a in attention),
        "intermediate_size": one(
            n for x in layers for n in (x.intermediate.dense.out_features, x.output.dense.in_features)
        ),
        "patch_size": one(patches.kernel_size + patches.stride),
        "image_size": int(positions**0.5) * patches.stride[0],
        "channels": patches.in_channels,
        "num_classes": model.class_labels_classifier.layers[-1].out_features - 1,
        "num_detection_tokens": embeddings.detection_tokens.shape[1],
    }


def of_language(model):
    layers = model.model.layers
    widths = [layer.self_attn.q_proj.in_features for layer in layers]
    return {
        "num_layers": len(layers),
        "hidden_size": one(widths),
        "num_attention_heads": one(layer.self_attn.q_proj.out_features // layer.self_attn.head_dim for layer in layers),
        "intermediate_size": one(n for x in layers for n in (x.mlp.c_fc.out_features, x.mlp.c_proj.in_features)),
        "vocab_size": one((model.model.embed_tokens.num_embeddings, model.lm_head.out_features)),
    }


def one(numbers):
    (number,) = set(numbers)
    return number


def test_vision_transformers_have_the_sizes_of_their_configuration():
    for i, (width, wide) in enumerate(PAIRS):
        sizes = {
            "image_size": 16 + 8 * (i % 3),
            "patch_size": (2, 4, 8)[i % 3],
            "channels": (1, 3)[i % 2],
            "num_classes": 2 + i % 5,
            "num_layers": 1 + i % 3,
            "hidden_size": width,
            "num_attention_heads": (1, 2, 4)[i % 3],
            "intermediate_size": wide,
        }
        with torch.device("meta"):
            built = timm_vit.build(sizes | {"global_pool": ("token", "avg")[i % 2]}, SHARING)
        assert of_vit(built.timm_model) == sizes


def test_every_pair_of_widths_that_timm_would_round_down():
    """All that a config of 8 to 1,024 by eights may say, by timm's own arithmetic; 448 and 488 made an MLP of 487."""
    hit = 0
    for width in range(8, 1025, 8):
        for wide in range(8, 4097, 8):
            hit += int(width * (wide / width)) != wide
            assert int(width * timm_vit._ratio(wide, width)) == wide
    assert hit > 500
    for width, factor in ((192, 4), (384, 2), (64, 1)):
        assert timm_vit._ratio(factor * width, width) == factor, "and what came out right is written as before"
    sizes = {"image_size": 8, "patch_size": 4, "channels": 3, "num_classes": 2, "num_layers": 1}
    sizes |= {"hidden_size": 448, "num_attention_heads": 8, "intermediate_size": 488}
    with torch.device("meta"):
        assert of_vit(timm_vit.build(sizes, SHARING).timm_model)["intermediate_size"] == 488


def test_a_stored_model_has_them_too(tmp_path):
    import timm

    sizes = {"image_size": 8, "patch_size": 4, "channels": 3, "num_classes": 2, "num_layers": 1}
    sizes |= {"hidden_size": 56, "num_attention_heads": 8, "intermediate_size": 61}
    assert int(56 * (61 / 56)) == 60, "one of the pairs that were hit"
    timm_vit.save_plain(timm_vit.build(sizes, SHARING), tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert of_vit(again) == sizes


def test_detectors_have_the_sizes_of_their_configuration():
    for i, (width, wide) in enumerate(PAIRS[::3]):
        sizes = {
            "image_size": 16 + 8 * (i % 3),
            "patch_size": (2, 4, 8)[i % 3],
            "channels": 3,
            "num_classes": 1 + i % 5,
            "num_layers": 1 + i % 3,
            "hidden_size": width,
            "num_attention_heads": (1, 2, 4)[i % 3],
            "intermediate_size": wide,
            "num_detection_tokens": 3 + i % 7,
        }
        with torch.device("meta"):
            assert of_yolos(detector.build(sizes, SHARING)) == sizes


def test_language_models_have_the_sizes_of_their_configuration():
    for i, (width, wide) in enumerate(PAIRS):
        sizes = {
            "num_layers": 1 + i % 3,
            "hidden_size": width,
            "num_attention_heads": (1, 2, 4)[i % 3],
            "intermediate_size": wide,
            "vocab_size": 30 + i,
        }
        with torch.device("meta"):
            built = language.build(sizes, SHARING, 32)
        assert of_language(built) == sizes
        assert built.config.max_position_embeddings == 32


@pytest.mark.parametrize(("section", "measured"), [(vit.Model, of_vit), (yolos.Model, of_yolos)])
def test_no_size_is_left_out_of_the_comparison(section, measured):
    """A size that a later version of the configuration has must be compared as well."""
    named = {name for name in section.model_fields if field_is_a_number(section, name)}
    example = {"image_size": 8, "patch_size": 4, "channels": 3, "num_classes": 2, "num_layers": 1}
    example |= {"hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8}
    if section is yolos.Model:
        with torch.device("meta"):
            built = detector.build(example | {"num_detection_tokens": 2}, SHARING)
    else:
        built = timm_vit.build(example, SHARING).timm_model
    assert named == measured(built).keys()


def field_is_a_number(section, name):
    """Whether a key of the configuration is a whole number."""
    return section.model_json_schema()["properties"][name].get("type") == "integer"
