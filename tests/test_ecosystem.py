"""What other libraries do with a model, done with shared and compressed ones: the same as with a plain one, or a word.

One suite of behaviours times every kind of source.
"""

import copy
import json
import logging
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from ecosystem_models import COMPRESSED, FEW, KINDS, difference, ids, logits, make
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)

import masa
from masa.sharing.linears import SharedLinear
from masa.sharing.weight_sources import KINDS as SOURCES

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(params=FEW)
def few(request):
    return request.param


def saved(kind, folder):
    make(kind).save_pretrained(folder)
    return folder


def save_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, "w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0")
    tokenizer.save_pretrained(folder)
    return tokenizer


def rounded(model, dtype):
    """A copy with its parameters in ``dtype``; ``model.to`` would round RoPE's table, too."""
    twin = copy.deepcopy(model)
    for p in twin.parameters():
        p.data = p.data.to(dtype)
    return twin


def test_every_kind_of_source_is_here():
    found = {source.kind for kind in KINDS for source in make(kind).model.shared.values()}
    assert found == set(SOURCES)


# folders, and who reads them


def test_auto_classes_read_the_factored_model(kind, tmp_path):
    model = make(kind)
    model.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert difference(back, model) == 0
    assert isinstance(back.model.layers[0].self_attn.q_proj, SharedLinear)
    assert back.sharing == masa.load(tmp_path).sharing == model.sharing
    assert masa.count_parameters(back).total == masa.count_parameters(model).total
    traces = {"quantization_config", "runtime", "transformers_weights", "masa", "_is_quantized"}
    assert not traces & set(back.config.to_dict()) and not hasattr(back, "hf_quantizer")
    assert back.half().dtype == torch.float16, "which a quantised model refuses"


def test_save_pretrained_and_masa_save_write_the_same_files(kind, tmp_path):
    model = make(kind)
    model.save_pretrained(tmp_path / "theirs")
    masa.save(model, tmp_path / "ours")
    theirs, ours = ({f.name: f.read_bytes() for f in (tmp_path / d).iterdir()} for d in ("theirs", "ours"))
    assert theirs == ours
    back = masa.load(tmp_path / "ours")
    back.save_pretrained(tmp_path / "again")
    assert {f.name: f.read_bytes() for f in (tmp_path / "again").iterdir()} == ours


def test_dtype_shards_and_device_maps(few, tmp_path):
    model = make(few)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for options in ({}, {"device_map": "auto"}, {"device_map": "cpu"}):
        assert difference(AutoModelForCausalLM.from_pretrained(tmp_path / "shards", **options), model) == 0
        assert difference(masa.load(tmp_path / "shards", **options), model) == 0
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "shards", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert difference(half, rounded(model, torch.bfloat16)) == 0


def test_a_revision_of_a_hub_repository(few, tmp_path, monkeypatch):
    """In the hub's cache as its client lays it out; nothing is fetched."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--org--small"
    saved(few, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = AutoModelForCausalLM.from_pretrained("org/small", revision="v1", cache_dir=tmp_path, local_files_only=True)
    assert difference(found, make(few)) == 0


def test_other_heads_and_none(few, tmp_path):
    model = make(few)
    model.save_pretrained(tmp_path / "lm")
    bare = AutoModel.from_pretrained(tmp_path / "lm")
    with torch.no_grad():
        assert torch.equal(bare(ids())[0], model.model(ids())[0])
    bare.save_pretrained(tmp_path / "bare")
    for back in (masa.load(tmp_path / "bare"), AutoModel.from_pretrained(tmp_path / "bare")):
        assert type(back).__name__ == "LlamaModel" and torch.equal(back(ids())[0], bare(ids())[0])
    assert difference(AutoModelForCausalLM.from_pretrained(tmp_path / "bare"), model) == 0, "its head is tied"
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "lm", num_labels=3)
    classifier.save_pretrained(tmp_path / "classifier")
    for back in (
        masa.load(tmp_path / "classifier"),
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier"),
    ):
        assert type(back).__name__ == "LlamaForSequenceClassification"
        assert torch.equal(back(ids()).logits, classifier(ids()).logits)
    model.model.save_pretrained(tmp_path / "part")
    assert torch.equal(masa.load(tmp_path / "part")(ids())[0], bare(ids())[0])


def test_the_choice_of_a_runtime(kind, tmp_path, caplog):
    model = make(kind)
    model.save_pretrained(tmp_path)
    for read in (masa.load, AutoModelForCausalLM.from_pretrained):
        plain = read(tmp_path, runtime="folded")
        assert {type(m) for m in plain.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
        assert not any("masa" in type(m).__module__ for m in plain.modules()) and not hasattr(plain, "sharing")
        assert difference(plain, masa.fold(model)) == 0 and difference(plain, model) < 1e-5
        assert isinstance(read(tmp_path, runtime="factored").model.layers[0].self_attn.q_proj, SharedLinear)
        with caplog.at_level(logging.WARNING, "masa"):
            caplog.clear()
            read(tmp_path)
            mixes = sum(s.read_numbers() for s in model.model.shared.values()) > sum(
                s.dense_numbers() for s in model.model.shared.values()
            )
            assert [r.message.count("runtime='folded'") for r in caplog.records] == [1] * mixes, (
                "only where it is a trade"
            )
        with pytest.raises(masa.MasaError, match="Did you mean 'folded'"):
            read(tmp_path, runtime="foldd")
    plain.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


WITHOUT = """
import json, sys
sys.modules["masa"] = None
import transformers
from lm_eval.models.huggingface import HFLM
from safetensors.torch import load_file

def values(folder):
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    model.load_state_dict(load_file(folder + "/model.safetensors"), strict=False)

ways = {name: getattr(transformers, name).from_pretrained for name in ("AutoModelForCausalLM", "AutoModel")}
ways["pipeline"] = lambda folder: transformers.pipeline("text-generation", folder)
ways |= {"load_state_dict": values, "lm-eval": lambda folder: HFLM(pretrained=folder, device="cpu")}
for folder in sys.argv[1:]:
    said = {}
    print("====", file=sys.stderr, flush=True)
    for name, way in ways.items():
        try:
            way(folder)
            said[name] = "loaded"
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(said))
"""
GUARDS = ("both", "shapes alone")


def without_masa(*folders):
    """What loaders say of folders in a process without masa, and what it says on stderr: one of each a folder."""
    done = subprocess.run([sys.executable, "-c", WITHOUT, *folders], capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"AutoModelForCausalLM"')]
    return dict(zip(folders, zip(found, done.stderr.split("====\n")[1:], strict=True), strict=True))


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
    """What loaders say that do not know masa: kind and guard -> message of each, and stderr."""
    base, folders = tmp_path_factory.mktemp("strangers"), {}
    for kind in ("masa", "svd-llm"):
        for number, guard in enumerate(GUARDS):
            folder = folders[kind, guard] = str(saved(kind, base / f"{kind}-{number}"))
            save_tokenizer(folder)
            if guard == "shapes alone":  # as where somebody took the keys for a mistake
                config = json.loads(Path(folder, "config.json").read_text())
                del config["transformers_weights"], config["quantization_config"]
                Path(folder, "config.json").write_text(json.dumps(config))
    found = without_masa(*folders.values())
    return {key: found[folder] for key, folder in folders.items()}


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("kind", ["masa", "svd-llm"])
def test_who_does_not_know_masa_stops(guard, kind, strangers):
    said, stderr = strangers[kind, guard]
    said = dict(said)
    assert len(said) == 5 and "loaded" not in said.values()
    shapes = said.pop("load_state_dict")
    assert "size mismatch for model.layers.0.self_attn.q_proj.weight" in shapes and "[1]" in shapes
    for way, message in said.items():
        if guard == "both":
            assert "import-masa-before-you-load-it-or-run-masa-export" in message, way
    if guard != "both":
        assert stderr.count("self_attn.q_proj.weight") + stderr.count("q_proj") >= 3, "named in the report"


@pytest.mark.parametrize("order", ["masa first", "transformers first", "model class first"])
def test_the_order_of_imports_does_not_matter(order, tmp_path):
    saved("low-rank", tmp_path)
    lines = {
        "masa first": "import masa\nfrom transformers import AutoModelForCausalLM",
        "transformers first": "import transformers\nimport masa\nfrom transformers import AutoModelForCausalLM",
        "model class first": "from transformers import AutoModelForCausalLM, LlamaForCausalLM\nimport masa",
    }[order]
    code = f"{lines}\nprint(type(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}).model.shared).__name__)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "SharedProjections"


def test_importing_masa_is_light():
    light = "import sys, masa; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", light], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "bank"])
def test_a_missing_tensor_is_named(name, few, tmp_path):
    saved(few, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(n for n in tensors if ".shared." in n) if name == "bank" else name
    save_file({k: v for k, v in tensors.items() if k != name}, tmp_path / "model.safetensors", {"format": "pt"})
    for read in (masa.load, AutoModelForCausalLM.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(masa.MasaError, match=name.removeprefix("model.")):
            read(tmp_path)


def test_a_plain_folder_labelled_as_factored_is_refused(tmp_path):
    saved("masa", tmp_path)
    dense = {k: v for k, v in make("plain").state_dict().items() if k != "lm_head.weight"}
    save_file(dense, tmp_path / "model.safetensors", {"format": "pt"})
    for read in (masa.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(masa.MasaError, match="shared"):
            read(tmp_path)


def test_a_source_of_another_shape_is_refused_whatever_is_ignored(tmp_path):
    saved("masa", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.shared.q.atoms"] = tensors["model.shared.q.atoms"][:1].clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(masa.MasaError, match=r"model\.shared\.q\.atoms has shape \(1, 48, 48\)"):
        AutoModelForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


def test_ties_of_the_users_own(tmp_path):
    """A matrix that two layers share by hand, and a head untied although the configuration says tied."""
    model = make("low-rank")
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)
    masa.save(model, tmp_path)
    for back in (masa.load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert difference(back, model) == 0


def test_pipeline_and_its_generation(few, tmp_path):
    saved(few, tmp_path)
    tokenizer = save_tokenizer(tmp_path)
    run = pipeline("text-generation", str(tmp_path))
    plain = pipeline("text-generation", masa.fold(make(few)), tokenizer=tokenizer)
    asked = {"max_new_tokens": 5, "do_sample": False}
    assert run("w5 w6 w7", **asked) == plain("w5 w6 w7", **asked)


# training


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        row = torch.randint(3, 96, (8,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": row, "labels": row}


def trainer(model, folder, steps=4, **more):
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=2, save_steps=2, eval_strategy="steps", eval_steps=2,
        metric_for_best_model="eval_loss", report_to=[], use_cpu=True, disable_tqdm=True, learning_rate=1e-2, **more,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows())


def test_trainer_checkpoints_resume_and_best_model(few, tmp_path):
    first = trainer(make(few), tmp_path)
    first.train()
    end = logits(first.model.eval())
    assert difference(make(few), end) > 1e-3, "it learned something"
    last = tmp_path / "checkpoint-4"
    for back in (masa.load(last), AutoModelForCausalLM.from_pretrained(last)):
        assert difference(back, end) == 0
    masa.save(first.model, tmp_path / "ours")
    for name in ("config.json", "model.safetensors"):
        assert (last / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()
    again = trainer(make(few), tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert difference(again.model.eval(), end) == 0
    best = trainer(make(few), tmp_path / "best", load_best_model_at_end=True)
    best.train()
    assert difference(best.model.eval(), masa.load(best.state.best_model_checkpoint)) == 0
    onward = trainer(AutoModelForCausalLM.from_pretrained(last), tmp_path / "onward", steps=2)
    assert onward.train().training_loss < first.state.log_history[0]["eval_loss"]


def test_coefficients_from_an_mlp_do_not_resume_in_silence(tmp_path):
    first = trainer(make("masa-mlp"), tmp_path, steps=2)
    first.train()
    assert difference(masa.load(tmp_path / "checkpoint-2"), first.model.eval()) < 1e-6
    with pytest.raises(masa.MasaError, match="no longer has the MLP that made them"):
        trainer(make("masa-mlp"), tmp_path).train(resume_from_checkpoint=True)


def loss(model):
    return model(input_ids=ids(), labels=ids()).loss


def gradients(model):
    model.train()
    loss(model).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing(kind):
    expected, model = gradients(make(kind)), make(kind)
    model.gradient_checkpointing_enable()
    found = gradients(model)
    assert found.keys() == expected.keys() and any(".shared." in name for name in found)
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-7)


PROCESSES = """
import copy, sys, tempfile
sys.path.insert(0, sys.argv[1])
import torch, masa
import torch.distributed as dist
from ecosystem_models import FEW, difference, logits, make, tokens
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo")
rank, batch = dist.get_rank(), tokens()[:4]

def train(model, rows):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
    return model.eval()

for kind in FEW:
    expected = logits(train(make(kind), batch))
    mine = batch[rank * 2 : rank * 2 + 2]
    ddp = train(torch.nn.parallel.DistributedDataParallel(make(kind)), mine)
    assert difference(ddp.module, expected) < 1e-4, (kind, "ddp")
    sharded = make(kind)
    for layer in sharded.model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    train(sharded, mine)
    assert difference(sharded, expected) < 1e-4, (kind, "fsdp2")
    whole = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        with tempfile.TemporaryDirectory() as folder:
            sharded.save_pretrained(folder, state_dict=whole)
            assert difference(masa.load(folder), expected) < 1e-4, (kind, "saved")
    dist.barrier()
print("DONE")
"""


def test_several_processes_by_ddp_and_fsdp2(tmp_path):
    file = tmp_path / "processes.py"
    file.write_text(PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(file)]
    done = subprocess.run(
        [*command, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0 and done.stdout.count("DONE") == 2, done.stderr[-3000:]


# running


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"do_sample": True}, {"cache_implementation": "static"}],
    ids=["greedy", "beams", "sampling", "static cache"],
)
def test_generate(options, kind):
    """A batch with padding on the left."""
    model, rows, found = make(kind), ids(), []
    seen = torch.ones_like(rows)
    seen[0, :4] = 0
    for one in (model, masa.fold(model)):
        torch.manual_seed(0)
        found.append(one.generate(rows, attention_mask=seen, max_new_tokens=6, **({"do_sample": False} | options)))
    assert torch.equal(*found)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_compile_under_autocast(mode, few):
    torch._dynamo.reset()
    model, eager = make(few), make(few)
    backend = "inductor" if (few, mode) in {("masa", "train"), ("svd-llm", "eval")} else "aot_eager"  # a minute each
    compiled = torch.compile(model.train(mode == "train"), fullgraph=mode == "eval", backend=backend)
    eager.train(mode == "train")
    with torch.autocast("cpu", torch.bfloat16):
        if mode == "eval":
            with torch.no_grad():
                found, expected = compiled(input_ids=ids()).logits, eager(input_ids=ids()).logits
            assert (found - expected).abs().max() < 0.1 * expected.abs().max()
            return
        loss(compiled).backward()
        loss(eager).backward()
    for (name, p), q in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or (p.grad - q.grad).norm() <= 0.1 * q.grad.norm() + 1e-5, name


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_any_batch_and_length(strict, few):
    class Logits(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, rows):
            return self.model(input_ids=rows, use_cache=False).logits

    dims = ({0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=2, max=64)},)
    exported = torch.export.export(Logits(make(few)), (ids(),), dynamic_shapes=dims, strict=strict).module()
    torch.testing.assert_close(exported(ids()), logits(make(few)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(exported(ids()[:1, :7]), make(few)(ids()[:1, :7]).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", ["cpu", "disk", "layers on disk", "all but the sources on disk", "all on disk"])
def test_offload(where, kind, tmp_path):
    """What is kept elsewhere comes when it is called for; folding would copy what is not there."""
    import accelerate

    expected = logits(make(kind))
    if where in ("cpu", "disk"):
        options = {"execution_device": "cpu"}
        move = accelerate.cpu_offload if where == "cpu" else accelerate.disk_offload
        model = move(make(kind), *([tmp_path / "off"] if where == "disk" else []), **options)
    else:
        saved(kind, tmp_path / "model")
        places = dict.fromkeys(
            ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.shared"), "cpu"
        )
        places["model.layers"] = "disk"
        if where == "all but the sources on disk":
            places |= {"model.norm": "disk"}
        if where == "all on disk":
            places |= {"model.shared": "disk", "model.norm": "disk"}
        options = {"device_map": places, "offload_folder": tmp_path / "off"}
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **options)
        with pytest.raises(masa.MasaError, match="whole model on one device"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "model", runtime="folded", **options)
    assert difference(model, expected) < 1e-6
    with torch.enable_grad():
        assert (model(input_ids=ids()).logits - expected).abs().max() < 1e-5
    with pytest.raises(masa.MasaError, match="Load it again without a device map"):
        masa.fold(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_dense(dtype, kind, tmp_path):
    """Against each model's own float32 logits."""
    model = masa.load(saved(kind, tmp_path))
    plain, exact = masa.fold(model), logits(model)

    def error(one):
        return float((logits(rounded(one, dtype)).float() - exact).pow(2).mean().sqrt())

    assert error(model) <= 1.5 * error(plain)


def test_copies_and_pickles(kind, tmp_path):
    model, expected = make(kind), logits(make(kind))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert difference(twin, expected) == 0
        with torch.no_grad():
            for p in twin.model.shared.parameters():
                p.zero_()
        assert difference(twin, expected) > 1e-3 and difference(model, expected) == 0
        twin.save_pretrained(tmp_path)
        assert difference(masa.load(tmp_path), twin) == 0, "it saves itself, not its origin"


def test_several_threads(few):
    """Half of them with gradients on; a row of a parameter that is read by [] would stop them for good."""
    model = make(few)
    expected = logits(model)

    def run(i):
        return logits(model) if i % 2 else model(input_ids=ids()).logits.detach()

    with ThreadPoolExecutor(4) as pool:
        assert max(float((found - expected).abs().max()) for found in pool.map(run, range(200))) < 1e-4


def test_the_configuration_stays_the_users(kind):
    model = make(kind)
    plain = AutoModelForCausalLM.from_config(model.config)
    assert type(plain.model.layers[0].self_attn.q_proj) is nn.Linear
    assert not {"quantization_config", "masa", "runtime"} & set(model.config.to_dict())


# layers that others recognise


def test_the_layers_are_linear(kind):
    model = make(kind)
    plain = masa.fold(model)
    for name in ("q_proj", "o_proj"):
        layer, dense = (getattr(m.model.layers[1].self_attn, name) for m in (model, plain))
        assert isinstance(layer, nn.Linear)
        assert (layer.in_features, layer.out_features) == (dense.in_features, dense.out_features)
        torch.testing.assert_close(torch.Tensor(layer.weight.clone()), dense.weight.data)
        x = torch.randn(3, layer.in_features)
        torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-5)


WRITES = {
    "a new weight": lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(48, 48))),
    "its data": lambda layer: setattr(layer.weight, "data", torch.zeros(48, 48)),
    "in place": lambda layer: layer.weight.zero_(),
    "in place on data": lambda layer: layer.weight.data.copy_(torch.zeros(48, 48)),
    "on a detached one": lambda layer: layer.weight.detach().mul_(0),
    "by index": lambda layer: layer.weight.data.__setitem__(0, 0.0),
    "a merge": lambda layer: layer.weight.data.__iadd__(torch.ones(48, 48)),
    "an initialisation": lambda layer: nn.init.normal_(layer.weight),
    "reset_parameters": lambda layer: layer.reset_parameters(),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_write_to_a_weight_is_refused_and_changes_no_layer(write, kind):
    model = make(kind)
    expected = logits(model)
    with torch.no_grad(), pytest.raises(masa.MasaError, match=r"masa\.fold\(model\)"):
        WRITES[write](model.model.layers[1].self_attn.q_proj)
    assert difference(model, expected) == 0


def test_int8_by_torch_refuses(kind):
    with pytest.raises(masa.MasaError, match="could be quantised"):
        torch.ao.quantization.quantize_dynamic(make(kind), {nn.Linear}, torch.qint8)
    done = torch.ao.quantization.quantize_dynamic(masa.fold(make(kind)), {nn.Linear}, torch.qint8)
    assert "quantized" in type(done.model.layers[0].self_attn.q_proj).__module__


def test_torchao_refuses(kind):
    quantization = pytest.importorskip("torchao.quantization")
    with pytest.raises(masa.MasaError, match=r"masa\.fold\(model\)"):
        quantization.quantize_(make(kind), quantization.Int8WeightOnlyConfig())


def test_another_quantisation_at_loading_is_refused(tmp_path):
    from transformers import FineGrainedFP8Config

    with pytest.raises(ValueError, match="MasaConfig"):
        AutoModelForCausalLM.from_pretrained(saved("low-rank", tmp_path), quantization_config=FineGrainedFP8Config())


def test_tensor_parallelism_is_refused_in_one_line(tmp_path):
    saved("low-rank", tmp_path)
    code = (
        "import masa, sys\nfrom transformers import AutoModelForCausalLM\n"
        "try:\n    AutoModelForCausalLM.from_pretrained(sys.argv[1], tp_plan='auto')\n"
        "except masa.MasaError as error:\n    print(error)"
    )
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    file = tmp_path / "tp.py"
    file.write_text(code)
    done = subprocess.run([*run, str(file), str(tmp_path)], capture_output=True, text=True)
    assert "Tensor parallelism splits the matrices" in done.stdout, done.stderr[-2000:]


def lora(**more):
    import peft

    return peft.LoraConfig(**({"target_modules": ["q_proj", "v_proj", "up_proj"], "r": 4} | more))


def awaken(model):
    """LoRA begins with zeros, which do nothing."""
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p.data, std=0.1)


def wearing(kind, **more):
    """A model with adapters that do something."""
    import peft

    model = peft.get_peft_model(make(kind), lora(**more))
    awaken(model)
    return model.eval()


def test_lora_trains_saves_loads(kind, tmp_path):
    import peft

    model = wearing(kind).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    loss(model).backward()
    optimizer.step()
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    model.eval().save_pretrained(tmp_path)
    assert difference(model, make(kind)) > 1e-3
    assert difference(peft.PeftModel.from_pretrained(make(kind), tmp_path), model) == 0
    assert difference(peft.PeftModel.from_pretrained(masa.fold(make(kind)), tmp_path), model) < 1e-4


def test_all_linear_finds_the_shared_layers_and_nothing_of_the_sources(kind):
    model = wearing(kind, target_modules="all-linear")
    found = {name.split(".lora_A")[0].rsplit(".", 1)[-1] for name, _ in model.named_modules() if "lora_A" in name}
    plain = wearing("plain", target_modules="all-linear")
    assert found == {n.split(".lora_A")[0].rsplit(".", 1)[-1] for n, _ in plain.named_modules() if "lora_A" in n}
    assert not any("shared" in name for name, _ in model.named_modules() if "lora_A" in name)


@pytest.mark.parametrize("safe", [False, True])
def test_a_merge_is_refused_and_folding_merges(safe, kind):
    model = wearing(kind)
    expected = logits(model)
    with pytest.raises(masa.MasaError, match=r"masa\.fold\(model\)"):
        wearing(kind).merge_and_unload(safe_merge=safe)
    for plain in (masa.fold(model), masa.fold(model.base_model.model)):
        assert difference(plain, expected) < 1e-5 and type(plain).__name__ == "LlamaForCausalLM"
        assert {type(m) for m in plain.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
        assert not any("lora" in name for name, _ in plain.named_parameters())
    assert difference(model, expected) == 0, "the model itself still wears it"


def test_saving_what_wears_an_adapter_names_the_ways_on(few, tmp_path):
    model = wearing(few)
    for one in (model, model.base_model.model):
        with pytest.raises(masa.MasaError, match=r"wears an adapter.*masa\.fold\(model\)"):
            masa.save(one, tmp_path / "never")
    with pytest.raises(masa.MasaError, match="wears an adapter"):
        model.base_model.model.save_pretrained(tmp_path / "never")
    masa.save(model.unload(), tmp_path / "base")
    assert difference(masa.load(tmp_path / "base"), make(few)) == 0


def test_an_adapter_that_cannot_be_merged_is_named(few):
    import peft

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(masa.MasaError, match="PromptTuningConfig, which cannot be merged"):
        masa.fold(peft.get_peft_model(make(few), config))


def test_transformers_own_adapters(few, tmp_path):
    model = make(few)
    model.add_adapter(lora(target_modules=["q_proj"]))
    awaken(model)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    other = make(few)
    other.load_adapter(str(tmp_path))
    assert difference(other, model) == 0 and difference(masa.fold(model), model) < 1e-5


def test_an_adapter_around_a_source_is_refused(few):
    import peft

    model = make(few)
    parameter = next(n for n, _ in model.named_parameters() if ".shared." in n).split("model.", 1)[1]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=[], target_parameters=[parameter], r=2))
    with pytest.raises(masa.MasaError, match="target_modules, not target_parameters"):
        logits(wrapped)


# pictures


def test_a_shared_vit_in_transformers(tmp_path):
    from test_vision import wrapped
    from transformers import AutoModelForImageClassification

    model = wrapped("masa").eval()
    size = model.timm_model.patch_embed.img_size
    pictures = torch.randn(2, model.timm_model.patch_embed.proj.in_channels, *size)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(pictures).logits
        for back in (
            AutoModelForImageClassification.from_pretrained(tmp_path),
            masa.load(tmp_path),
            pickle.loads(pickle.dumps(model)),
        ):
            assert torch.equal(back(pictures).logits, expected)
        for runtime in ("factored", "folded"):
            back = AutoModelForImageClassification.from_pretrained(tmp_path, runtime=runtime)
            torch.testing.assert_close(back(pictures).logits, expected, rtol=1e-4, atol=1e-5)
    assert isinstance(model.timm_model.blocks[0].attn.qkv, nn.Linear)
    half = copy.deepcopy(model).bfloat16()(pictures.bfloat16()).logits.float()
    assert (half - expected).abs().max() < 0.1 * expected.abs().max() + 0.05
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model)(pictures).logits, expected, rtol=1e-3, atol=1e-4)


def test_lora_on_a_shared_vit(tmp_path):
    import peft
    from test_vision import wrapped

    model = wrapped("masa").eval()
    patch = model.timm_model.patch_embed
    pictures = torch.randn(2, patch.proj.in_channels, *patch.img_size)
    worn = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["qkv", "proj", "fc1"], r=2)).eval()
    awaken(worn)
    with torch.no_grad():
        expected = worn(pictures).logits
        assert (expected - model(pictures).logits).abs().max() > 1e-4
        torch.testing.assert_close(masa.fold(worn)(pictures).logits, expected, rtol=1e-4, atol=1e-5)
    every = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules="all-linear", r=2))
    assert not any("qkv.q" in name or "shared" in name for name, _ in every.named_modules() if "lora_A" in name)


def test_a_shared_yolos_in_transformers(tmp_path):
    from test_detection import MODEL
    from transformers import AutoModelForObjectDetection

    from masa.models import detector

    model = detector.build(MODEL, {"method": "masa"}).eval()
    model.save_pretrained(tmp_path)
    pictures = torch.randn(1, 3, *model.config.image_size)
    with torch.no_grad():
        expected = model(pictures).logits
        for back in (AutoModelForObjectDetection.from_pretrained(tmp_path), masa.load(tmp_path), copy.deepcopy(model)):
            assert torch.equal(back(pictures).logits, expected)
        plain = AutoModelForObjectDetection.from_pretrained(tmp_path, runtime="folded")
        torch.testing.assert_close(plain(pictures).logits, expected, rtol=1e-4, atol=1e-5)


def test_grouped_heads_are_anybodys(tmp_path):
    """Nothing is computed, so no guard: who does not know masa reads it, and masa.load knows how it came about."""
    from conftest import language_model

    model = masa.share(language_model(), {"method": "gqa", "num_key_value_heads": 2}).eval()
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).num_key_value_heads == 2
    ((said, _),) = without_masa(str(tmp_path)).values()
    assert said["AutoModel"] == said["AutoModelForCausalLM"] == "loaded"
    assert masa.load(tmp_path).sharing == model.sharing
    assert masa.count_parameters(masa.load(tmp_path)) == masa.count_parameters(model)


def test_the_compressed_kinds_are_those_that_compression_makes():
    assert {type(make(kind).sharing.spec).__name__ for kind in COMPRESSED} == {"CompressionSpec"}
