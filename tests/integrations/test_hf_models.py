"""Models of transformers from small configs: what is pruned, by which gradients, what stays tied and finite."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastfisher as ff
from fastfisher.errors import FastFisherError
from fastfisher.fisher.batches import read_batch
from fastfisher.fisher.objective import Objective, evaluating
from fastfisher.prune.targets import find_targets

transformers = pytest.importorskip("transformers")

WORDS, WIDTH, LENGTH = 32, 16, 10
LOOPED = "Samples are differentiated one at a time: vmap cannot trace the model"
FEW: dict[str, Any] = {"num_grads": 32, "block_size": 16, "num_recomputations": 1}


def _bert(kind: str, **changes: Any) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=3,
        **changes,
    )
    return getattr(transformers, f"BertFor{kind}")(config)


def _gpt2(**changes: Any) -> nn.Module:
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=16, **ends, **changes
    )
    return transformers.GPT2LMHeadModel(config)


def _decoder(name: str, **changes: Any) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        max_position_embeddings=16,
        **changes,
    )
    return getattr(transformers, f"{name}ForCausalLM")(config)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "bert": lambda **c: _bert("SequenceClassification", **c),
    "bert tokens": lambda **c: _bert("TokenClassification", **c),
    "bert words": lambda **c: _bert("MaskedLM", **c),
    "gpt2": _gpt2,
    "llama": lambda **c: _decoder("Llama", **c),
    "llama tied": lambda **c: _decoder("Llama", tie_word_embeddings=True, **c),
    "qwen2": lambda **c: _decoder("Qwen2", **c),
    "qwen2 tied": lambda **c: _decoder("Qwen2", tie_word_embeddings=True, **c),
}
TIED = {
    "bert words": ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
    "gpt2": ("transformer.wte.weight", "lm_head.weight"),
    "llama tied": ("model.embed_tokens.weight", "lm_head.weight"),
    "qwen2 tied": ("model.embed_tokens.weight", "lm_head.weight"),
}


def made(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    return MODELS[kind](**changes).eval()


def batches(kind: str, *, mask: bool = False, count: int = 4) -> list[dict[str, Tensor]]:
    """Sentences of 10 words, 8 to a batch; with a mask those of every second are shorter, and padding has no label."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        words = torch.randint(1, WORDS, (8, LENGTH), generator=generator)
        seen = torch.arange(LENGTH) < (LENGTH - torch.arange(8) % 4)[:, None]  # [8, LENGTH]
        labels = words[:, 0] % 3 if kind == "bert" else words % 3 if kind == "bert tokens" else words
        batch = {"input_ids": words, "labels": labels}
        if mask:
            batch["attention_mask"] = seen.long()
            if kind != "bert":
                batch["labels"] = torch.where(seen, labels, -100)
        found.append(batch)
    return found


def loss_of(model: nn.Module, data: list[dict[str, Tensor]]) -> float:
    with torch.no_grad():
        return sum(float(model(**batch).loss) for batch in data) / len(data)


def zeros(model: nn.Module, names: Any) -> int:
    return sum(int((model.get_parameter(name) == 0).sum()) for name in names)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mask", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("kind", MODELS)
def test_gradients_are_those_of_single_sentences(kind: str, mask: bool, attention: str) -> None:
    """By vmap or, where a mask is looked at by Python code, one at a time: the same rows as by backward()."""
    model = made(kind, attn_implementation=attention).double()
    names = list(find_targets(model).parameters)
    samples = read_batch(batches(kind, mask=mask)[0])
    objective = Objective(model, names)
    with warnings.catch_warnings(), evaluating(model):
        warnings.simplefilter("error")
        grads, losses = objective.gradients(samples)
    if not mask:
        assert objective.why_loop is None
    for i in (0, 3):
        model.zero_grad()
        loss = model(**samples.narrow(i, i + 1).batch()).loss
        loss.backward()
        torch.testing.assert_close(losses[i], loss.detach())
        for name in names:
            expected = model.get_parameter(name).grad
            torch.testing.assert_close(grads[name][i], expected, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize(
    ("method", "scope"),
    [
        ("woodfisher", "global"),
        ("woodfisher", "layer"),
        ("woodtaylor", "global"),
        ("fishleg", "layer"),
        ("kfac", "global"),
        ("magnitude", "layer"),
    ],
)
@pytest.mark.parametrize("kind", MODELS)
def test_every_method_prunes_every_model(kind: str, method: str, scope: str) -> None:
    model, data = made(kind), batches(kind)
    # K-FAC sees layers only, and an embedding is none
    ignore = [TIED[kind][0]] if method == "kfac" and kind in TIED else None
    options = {"sparsity": 0.6, "method": method, "scope": scope, "ignore": ignore}
    plan = ff.plan(model, data, **options, **FEW)
    report = ff.prune(model, data, **options, **FEW)
    names = [layer.name for layer in report.layers]
    assert zeros(model, names) == report.num_zeros == round(0.6 * report.num_weights)
    assert plan.sizes.num_weights == report.num_weights
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert not report.notes
    if scope == "layer":
        assert all(layer.sparsity == pytest.approx(0.6, abs=0.01) for layer in report.layers)


def test_what_is_pruned_by_default() -> None:
    """Everything linear, Conv1D too; embeddings where they are the output layer at once; no position or norm."""
    for kind in MODELS:
        model = made(kind)
        linear = {
            name
            for name, module in model.named_modules(remove_duplicate=False)
            if isinstance(module, nn.Linear | transformers.pytorch_utils.Conv1D)
        }
        found = find_targets(model)
        pruned = {alias.removesuffix(".weight") for names in found.aliases.values() for alias in names}
        assert pruned == linear | {name.removesuffix(".weight") for name in TIED.get(kind, ())}, kind


@pytest.mark.parametrize("kind", TIED)
def test_tied_embeddings_stay_tied_or_stay_dense(kind: str, tmp_path: Path) -> None:
    first, second = TIED[kind]
    model, data = made(kind), batches(kind)
    report = ff.prune(model, data, sparsity=0.6, scope="layer", **FEW)
    assert [layer.name for layer in report.layers].count(first) == 1
    assert second not in [layer.name for layer in report.layers]
    assert model.get_parameter(first) is model.get_parameter(second)
    assert zeros(model, [second]) == pytest.approx(0.6 * WORDS * WIDTH, abs=2)

    expected = model.state_dict()
    ff.save(model, tmp_path / "ours.safetensors", report=report)
    again = made(kind)
    ff.load(tmp_path / "ours.safetensors", again)
    model.save_pretrained(tmp_path / "theirs")
    for other in (again, type(model).from_pretrained(tmp_path / "theirs")):
        assert other.get_parameter(first) is other.get_parameter(second)
        assert all(torch.equal(value, expected[name]) for name, value in other.state_dict().items())

    for pattern in (first, second, second.removesuffix(".weight")):
        model = made(kind)
        before = model.get_parameter(first).detach().clone()
        ff.prune(model, data, sparsity=0.6, ignore=pattern, **FEW)
        assert torch.equal(model.get_parameter(second), before)


@pytest.mark.parametrize(
    ("kind", "ignore", "left", "without"),
    [
        ("bert", "*.embeddings.*", 14, "embeddings"),
        ("bert words", "*.embeddings.*", 13, "embeddings"),
        ("bert words", "cls", 12, "cls"),
        ("bert", "*.layer.0.*", 8, "layer.0."),
        ("bert", "*.attention.*", 6, "attention"),
        ("bert", ["classifier", "*.pooler"], 12, "pooler"),
        ("gpt2", "lm_head", 8, "wte"),
        ("gpt2", "*.attn.*", 5, "attn"),
        ("llama", "lm_head", 14, "lm_head"),
        ("llama", "*.layers.0.*", 8, "layers.0."),
        ("qwen2", "*.self_attn.[qk]_proj", 11, "q_proj"),
    ],
)
def test_layers_are_left_out_by_name(kind: str, ignore: str | list[str], left: int, without: str) -> None:
    model, data = made(kind), batches(kind)
    before = copy.deepcopy(model.state_dict())
    report = ff.prune(model, data, sparsity=0.5, ignore=ignore, **FEW)
    names = {layer.name for layer in report.layers}
    assert len(names) == left
    assert not any(without in name for name in names)
    same = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    assert not names & same
    assert {name for name in before if without in name} <= same


@pytest.mark.parametrize("pattern", ["2:4", "block4"])
def test_patterns_run_along_the_inputs_of_conv1d(pattern: str) -> None:
    model = made("gpt2")
    ff.prune(model, batches("gpt2"), sparsity=0.5, pattern=pattern, scope="layer", ignore="lm_head", **FEW)
    for name, module in model.named_modules():
        if isinstance(module, transformers.pytorch_utils.Conv1D):
            counts = (module.weight == 0).T.reshape(-1, 4).sum(1)
            assert counts.unique().tolist() == ([2] if pattern == "2:4" else [0, 4]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["bert", "bert words", "gpt2", "llama", "qwen2 tied"])
def test_half_precision_stays_and_prunes_alike(kind: str, dtype: torch.dtype) -> None:
    """The loss runs in the model's dtype, the rest in float32: what is removed is nearly what float32 removes."""
    wide, narrow = made(kind).to(dtype).float(), made(kind).to(dtype)
    data = batches(kind, mask=kind == "bert")
    reports = [ff.prune(model, data, sparsity=0.5, method="woodtaylor", **FEW) for model in (wide, narrow)]
    assert {p.dtype for p in narrow.parameters()} == {dtype}
    assert all(torch.isfinite(p).all() for p in narrow.parameters())
    assert reports[1].num_zeros == zeros(narrow, [layer.name for layer in reports[1].layers])
    pairs = [(wide.get_parameter(r.name) == 0, narrow.get_parameter(r.name) == 0) for r in reports[0].layers]
    same = sum(int((a == b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)
    assert same > 0.9
    assert loss_of(narrow, data) == pytest.approx(loss_of(wide, data), rel=0.05)


@pytest.mark.parametrize("kind", ["bert", "bert tokens", "gpt2", "llama"])
def test_padding_is_looked_at_and_said(kind: str) -> None:
    """Code of transformers asks whether a mask hides anything, which vmap cannot answer for all samples at once."""
    model, data = made(kind), batches(kind, mask=True)
    report = ff.prune(model, data, sparsity=0.5, **FEW)
    assert [note for note in report.notes if note.startswith(LOOPED)]
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_sentence_without_labels_is_left_out() -> None:
    data = batches("bert tokens", mask=True, count=5)
    data[1]["labels"][2] = -100  # the mean over no position
    report = ff.prune(made("bert tokens"), data, sparsity=0.5, **FEW)
    assert any("non-finite" in note or "not finite" in note for note in report.notes), report.notes
    assert report.num_zeros == round(0.5 * report.num_weights)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_gradient_checkpointing_changes_rounding_only(kind: str) -> None:
    """Its hook on the embedding asks for gradients, which vmap refuses: samples are differentiated one at a time."""
    plain, model = made(kind), made(kind)
    model.gradient_checkpointing_enable()
    model.train()
    for one in (plain, model):
        ff.prune(one, batches(kind), sparsity=0.5, **FEW)
    assert model.training
    for (name, one), other in zip(plain.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bert words", "gpt2", "qwen2 tied"])
def test_tied_models_are_pruned_while_they_train(kind: str, dtype: torch.dtype) -> None:
    model, data = made(kind).to(dtype), batches(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = ff.CubicSchedule(0.3, 0.8, begin=0, end=2)
    pruner = ff.Pruner(model, schedule=schedule, strict=True, **{**FEW, "num_recomputations": 0})
    pruner.attach(optimizer)
    first, second = TIED[kind]
    for epoch in range(4):
        pruner.step(data, epoch=epoch)
        for batch in data:
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
        assert pruner.sparsity == pytest.approx(schedule(min(epoch, 2)), abs=1e-3)
        assert not bool(model.get_parameter(second).detach()[~pruner.masks[first]].any())
    pruner.finalize()
    assert model.get_parameter(first) is model.get_parameter(second)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert math.isfinite(loss_of(model, data))


def test_woodfisher_beats_magnitude_on_a_trained_decoder() -> None:
    """Sentences that count on by a step of their own; magnitude and WoodFisher as they come."""
    generator = torch.Generator().manual_seed(5)
    start, step = torch.randint(WORDS, (2, 256, 1), generator=generator)
    words = (start + (1 + step % 3) * torch.arange(LENGTH)) % WORDS
    data = [{"input_ids": part, "labels": part} for part in words.split(32)]
    model = made("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(25):
        for batch in data:
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    losses = {}
    for method in ("magnitude", "woodfisher"):
        pruned = copy.deepcopy(model)
        ff.prune(pruned, data, sparsity=0.5, method=method, num_grads=128)
        losses[method] = loss_of(pruned, data)
    assert loss_of(model, data) < losses["woodfisher"] < losses["magnitude"]


def test_bad_input_is_one_sentence() -> None:
    model, data = made("llama"), batches("llama")
    cases: list[tuple[Mapping[str, Any], str]] = [
        ({"ignore": "*.layer.0.*"}, r"matched none of \d+ tensors\. Closest: "),
        ({"fisher_type": "mc"}, r"needs batches \(input, label\), or dicts with integer labels \[n\]"),
    ]
    for options, match in cases:
        with pytest.raises(FastFisherError, match=match):
            ff.prune(model, data, sparsity=0.5, **FEW, **options)
    with pytest.raises(FastFisherError, match=r"returned no loss .* add labels to the batch"):
        ff.prune(model, [{"input_ids": batch["input_ids"]} for batch in data], sparsity=0.5, **FEW)
    with pytest.raises(FastFisherError, match=r"word_embeddings\.weight' belongs to Embedding: leave it out"):
        ff.prune(made("bert words"), batches("bert words"), sparsity=0.5, method="kfac", **FEW)
