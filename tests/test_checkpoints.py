"""Checkpoints give the logits of `transformers`: those stored here, and all where it is installed.

`python tests/test_checkpoints.py` (with torch and transformers) writes the stored ones anew.
"""

import json
import math
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from cheap import compiled, normal
from safetensors.numpy import load_file, save_file

from probbp.models import blob, checkpoints, lora

STORED = Path(__file__).with_suffix(".json")
TINY = {
    "vocab_size": 19,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 6,  # shorter than the sequences: the rotary variants differ
    "pad_token_id": 0,
}
LLAMA = {
    **TINY,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}
WIDE = LLAMA | {"head_dim": 12}  # six waves for the rotary variants to tell apart
QWEN2 = {
    **TINY,
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "num_key_value_heads": 1,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
QWEN3 = {
    **TINY,
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "num_key_value_heads": 2,
    "head_dim": 6,
}
BERT = {
    **TINY,
    "architectures": ["BertForSequenceClassification"],
    "model_type": "bert",
    "max_position_embeddings": 16,
    "num_labels": 3,
}
ROBERTA = BERT | {
    "architectures": ["RobertaForSequenceClassification"],
    "model_type": "roberta",
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
}


def rope(**parameters):
    return {"rope_parameters": {"rope_theta": 100.0, **parameters}}


CONFIGS = {
    "llama": LLAMA,
    "llama, biases, tied": LLAMA
    | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "llama, one group, wide heads": LLAMA | {"num_key_value_heads": None, "head_dim": 8},
    "llama, linear": WIDE | rope(rope_type="linear", factor=3.0),
    "llama, dynamic": WIDE | rope(rope_type="dynamic", factor=2.0),
    "llama, llama3": WIDE
    | rope(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=0.2,
        high_freq_factor=0.8,
        original_max_position_embeddings=6,
    ),
    "llama, yarn": WIDE
    | rope(
        rope_type="yarn",
        factor=4.0,
        original_max_position_embeddings=24,
        beta_fast=4.0,
        beta_slow=0.5,
        truncate=False,
    ),
    "llama, yarn, factor left out": WIDE
    | {"max_position_embeddings": 48}
    | rope(rope_type="yarn", factor=None, original_max_position_embeddings=16),
    "llama, yarn, scaled": WIDE
    | rope(
        rope_type="yarn",
        factor=4.0,
        original_max_position_embeddings=24,
        mscale=1.5,
        mscale_all_dim=0.7,
    ),
    "llama, written by an older version": LLAMA
    | {"rope_theta": 50.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama, classifier": LLAMA
    | {"architectures": ["LlamaForSequenceClassification"], "num_labels": 3},
    "llama, no head": LLAMA | {"architectures": ["LlamaModel"]},
    "qwen2": QWEN2,
    "qwen2, sliding": QWEN2
    | {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    "qwen2, classifier": QWEN2
    | {"architectures": ["Qwen2ForSequenceClassification"], "num_labels": 2},
    "qwen3": QWEN3,
    "qwen3, sliding by layer": QWEN3
    | {
        "use_sliding_window": True,
        "sliding_window": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "qwen3, classifier": QWEN3
    | {"architectures": ["Qwen3ForSequenceClassification"], "num_labels": 2},
    "bert": BERT,
    "bert, another activation": BERT | {"hidden_act": "gelu_new", "num_labels": 1},
    "bert, no head": BERT | {"architectures": ["BertModel"]},
    "roberta": ROBERTA,
    "roberta, another padding token": ROBERTA | {"pad_token_id": 1},
}
every_config = pytest.mark.parametrize("name", CONFIGS)


def first_of(*names):
    """Parametrise a test that is the same for all: the stored logits tell the networks apart."""
    others = [pytest.param(name, marks=pytest.mark.slow) for name in names[1:]]
    return pytest.mark.parametrize("name", [names[0], *others])


def tokens(config):
    """Return three sequences of nine tokens, the second padded at the end, the third before."""
    pad = config["pad_token_id"]
    ids = 2 + np.arange(27).reshape(3, 9) * 5 % 17
    mask = np.ones((3, 9), int)
    mask[1, 6:] = 0
    # RoBERTa counts its positions by the tokens, the others do not.
    mask[2, :2] = 0
    return np.where(mask, ids, pad), mask


def shapes(config):
    """Return the tensors of a checkpoint, written out independently of what is tested."""
    head = config["architectures"][0]
    width, hidden, vocabulary = 16, 24, config["vocab_size"]
    labels = config.get("num_labels")
    layers = range(config["num_hidden_layers"])
    if config["model_type"] in ("bert", "roberta"):
        body = "" if head.endswith("Model") else config["model_type"] + "."
        matrices = {"pooler.dense": (width, width)} if "Bert" in head else {}
        norms = ["embeddings.LayerNorm"]
        for i in layers:
            layer = f"encoder.layer.{i}."
            for part in ("self.query", "self.key", "self.value", "output.dense"):
                matrices[f"{layer}attention.{part}"] = (width, width)
            matrices[f"{layer}intermediate.dense"] = (hidden, width)
            matrices[f"{layer}output.dense"] = (width, hidden)
            norms += [f"{layer}attention.output.LayerNorm", f"{layer}output.LayerNorm"]
        out = {
            f"{body}embeddings.{part}_embeddings.weight": (rows, width)
            for part, rows in (
                ("word", vocabulary),
                ("position", config["max_position_embeddings"]),
                ("token_type", config.get("type_vocab_size", 2)),
            )
        }
        matrices = {body + k: v for k, v in matrices.items()}
        if head == "RobertaForSequenceClassification":
            matrices |= {"classifier.dense": (width, width), "classifier.out_proj": (labels, width)}
        elif labels and not head.endswith("Model"):
            matrices["classifier"] = (labels, width)
        out |= {f"{k}.weight": v for k, v in matrices.items()}
        out |= {f"{k}.bias": v[:1] for k, v in matrices.items()}
        return out | {f"{body}{k}.{part}": (width,) for k in norms for part in ("weight", "bias")}
    body = "" if head.endswith("Model") else "model."
    heads, dim = 4, config.get("head_dim", 4)
    groups = config["num_key_value_heads"] or heads
    out = {f"{body}embed_tokens.weight": (vocabulary, width), f"{body}norm.weight": (width,)}
    for i in layers:
        layer = f"{body}layers.{i}."
        sizes = {
            "self_attn.q_proj": (heads * dim, width),
            "self_attn.k_proj": (groups * dim, width),
            "self_attn.v_proj": (groups * dim, width),
            "self_attn.o_proj": (width, heads * dim),
            "mlp.gate_proj": (hidden, width),
            "mlp.up_proj": (hidden, width),
            "mlp.down_proj": (width, hidden),
        }
        biased = list(sizes)[:3] if config["model_type"] == "qwen2" else []
        if config.get("attention_bias"):
            biased = list(sizes)
        out |= {f"{layer}{k}.weight": v for k, v in sizes.items()}
        out |= {f"{layer}{k}.bias": sizes[k][:1] for k in biased}
        if config["model_type"] == "qwen3":
            out |= {f"{layer}self_attn.{k}_norm.weight": (dim,) for k in "qk"}
        for part in ("input_layernorm", "post_attention_layernorm"):
            out[f"{layer}{part}.weight"] = (width,)
    if head.endswith("CausalLM") and not config.get("tie_word_embeddings"):
        out["lm_head.weight"] = (vocabulary, width)
    if head.endswith("Classification"):
        out["score.weight"] = (labels, width)
    return out


def write(folder, config, dtype=np.float32, num_files=1):
    """Write a checkpoint whose weights are a formula: waves, around one for the scales of norms."""
    folder.mkdir(exist_ok=True)
    weights = {}
    for k, (name, shape) in enumerate(sorted(shapes(config).items())):
        wave = np.sin(1.3 * k + (0.7 + 0.01 * k) * np.arange(np.prod(shape))).reshape(shape)
        is_scale = "norm" in name.lower() and name.endswith("weight")
        weights[name] = (1 + 0.3 * wave if is_scale else 0.4 * wave).astype(dtype)
    saved = dict(config)
    if "num_labels" in saved:  # this is how transformers writes it
        saved["id2label"] = {str(i): f"LABEL_{i}" for i in range(saved.pop("num_labels"))}
    (folder / "config.json").write_text(json.dumps(saved))
    names = list(weights)
    files = [f"model-{i + 1:05}-of-{num_files:05}.safetensors" for i in range(num_files)]
    if num_files == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        for i, file in enumerate(files):
            save_file({name: weights[name] for name in names[i::num_files]}, folder / file)
        where = {name: files[i % num_files] for i, name in enumerate(names)}
        index = {"metadata": {}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def load(folder, **options):
    """Load a checkpoint and compile its function."""
    checkpoint = checkpoints.load(folder, **options)
    apply_fn = compiled(checkpoint.apply_fn)
    return checkpoint._replace(apply_fn=apply_fn)


def digest(logits):
    """Return two figures of each sequence, at its last token."""
    logits = np.asarray(logits, np.float64)
    if logits.ndim == 3:
        logits = logits[np.arange(3), [8, 5, 8]]
    return logits[:, :2].ravel().tolist()


def assert_equal(a, b, atol=3e-5):
    """Compare to `atol` of the largest entry, or of one."""

    def leaf(a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol * max(1.0, np.max(np.abs(b))))

    jax.tree.map(leaf, a, b)


@first_of("bert", "llama", "qwen2, classifier", "qwen3", "roberta")
def test_a_checkpoint_is_adapted_unedited(name, tmp_path):
    """A low-rank update in the products is the dense weight."""
    checkpoint = checkpoints.load(write(tmp_path, CONFIGS[name]))
    ids, mask = map(jnp.asarray, tokens(CONFIGS[name]))
    bayes = blob.bayesian_lora(
        checkpoint.apply_fn,
        checkpoint.params,
        target=r"(q_proj|v_proj|self\.query|self\.value)\.weight",
        example=(ids, mask),
        rank=2,
        likelihood=lambda logits: dist.Categorical(logits=logits.reshape(3, -1)),
    )
    assert len(bayes.layouts) == 2 * CONFIGS[name]["num_hidden_layers"]
    factors = {
        weight: lora.Factors(
            0.1 * normal(i, *layout.shape_of_a(2)),
            0.1 * normal(100 + i, *layout.shape_of_b(2)),
        )
        for i, (weight, layout) in enumerate(bayes.layouts.items())
    }

    @compiled
    def everything(params):
        merged = lora.merge(params, bayes.layouts, factors, bayes.scale)
        networks = [checkpoint.apply_fn(p, ids, mask) for p in (merged, params)]
        return bayes.apply(params, factors, ids, mask), *networks

    adapted, dense, plain = everything(checkpoint.params)
    assert_equal(adapted, dense)
    assert np.max(np.abs(dense - plain)) > 1e-3


@every_config
def test_the_logits_are_those_stored(name, tmp_path):
    apply_fn, params, config = load(write(tmp_path, CONFIGS[name]))
    logits = apply_fn(params, *tokens(CONFIGS[name]))
    assert logits.dtype == jnp.float32
    assert_equal(
        np.array(digest(logits)), np.array(json.loads(STORED.read_text())[name]), atol=1e-4
    )
    assert config["architectures"] == CONFIGS[name]["architectures"]


@every_config
def test_names_and_layout_are_the_file_s(name, tmp_path):
    params = load(write(tmp_path, CONFIGS[name])).params
    stored = load_file(tmp_path / "model.safetensors")
    left_out = set(stored) - set(params)
    assert set(params) <= set(stored)
    assert all(part.startswith("pooler") for part in left_out)
    for key, value in params.items():
        np.testing.assert_array_equal(value, stored[key])


def run_transformers(folder, ids, mask, **extras):
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    # The Auto classes look into config.json for nothing but the architecture.
    model = getattr(transformers, config.architectures[0]).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    extras = {k: torch.tensor(np.asarray(v)) for k, v in extras.items()}
    with torch.no_grad():
        out = model.eval()(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            output_hidden_states=True,
            **extras,
        )
    logits = out["logits"] if "logits" in out else out["last_hidden_state"]
    return logits.numpy(), [state.numpy() for state in out["hidden_states"]]


@pytest.mark.filterwarnings("ignore")
@every_config
def test_logits_and_hidden_states_are_those_of_transformers(name, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    config = CONFIGS[name]
    ids, mask = tokens(config)
    apply_fn, params, _ = load(write(tmp_path, config))
    logits, states = apply_fn(params, ids, mask, output_hidden_states=True)
    expected, expected_states = run_transformers(tmp_path, ids, mask)
    if logits.shape[:2] == mask.shape:  # at padding nothing has a meaning
        logits, expected = logits[mask == 1], expected[mask == 1]
    assert np.std(expected) > 0.05
    assert_equal(logits, expected)
    assert len(states) == len(expected_states)
    for state, its in zip(states, expected_states, strict=True):
        assert_equal(state[mask == 1], its[mask == 1])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shard_size", ["5GB", "6KB"])
@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Qwen3", "Bert"])
def test_what_save_pretrained_writes_is_read(name, shard_size, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {k: v for k, v in TINY.items() if k != "max_position_embeddings"}
    small |= {} if name == "Bert" else {"num_key_value_heads": 2}
    config = getattr(transformers, f"{name}Config")(**small, initializer_range=0.3)
    head = "ForSequenceClassification" if name == "Bert" else "ForCausalLM"
    model = getattr(transformers, name + head)(config)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "6KB")
    ids, mask = tokens(TINY)
    apply_fn, params, _ = load(tmp_path)
    logits, expected = apply_fn(params, ids, mask), run_transformers(tmp_path, ids, mask)[0]
    keep = mask == 1 if name != "Bert" else slice(None)
    assert_equal(logits[keep], expected[keep])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama, dynamic", "bert"])
def test_positions_and_types_are_those_of_transformers(name, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    ids, mask = tokens(CONFIGS[name])
    extras = {"position_ids": np.arange(9)[None, ::-1].copy()}
    if name == "bert":
        extras["token_type_ids"] = ids % 2
    apply_fn, params, _ = load(write(tmp_path, CONFIGS[name]))
    expected, _ = run_transformers(tmp_path, ids, mask, **extras)
    logits = apply_fn(params, ids, mask, **extras)
    keep = mask == 1 if name != "bert" else slice(None)
    assert_equal(logits[keep], expected[keep])


@first_of("roberta", "llama, dynamic", "qwen2, sliding", "qwen3, classifier", "bert")
def test_padding_changes_nothing(name, tmp_path):
    config = CONFIGS[name]
    if "dynamic" in name:
        config = config | {"max_position_embeddings": 9}  # it depends on the longest by definition
    apply_fn, params, _ = load(write(tmp_path, config))
    ids, mask = tokens(config)
    logits, alone = apply_fn(params, ids, mask)[1:2], apply_fn(params, ids[1:2, :6])
    assert_equal(logits[:, :6] if logits.shape[:2] == (1, 9) else logits, alone)


@first_of("qwen2, sliding", "llama", "qwen3")
def test_a_token_does_not_see_what_comes_after_it(name, tmp_path):
    apply_fn, params, _ = load(write(tmp_path, CONFIGS[name]))
    ids, _ = tokens(CONFIGS[name])
    changed = apply_fn(params, np.where(np.arange(9) < 5, ids, 7)) - apply_fn(params, ids)
    assert_equal(changed[:, :5], np.zeros_like(changed[:, :5]))
    assert np.all(np.any(abs(changed[:, 5:]) > 1e-3, axis=(1, 2)))


def test_a_sequence_classifier_takes_the_last_token(tmp_path):
    config = CONFIGS["llama, classifier"]
    ids, mask = tokens(config)
    with_pad = load(write(tmp_path / "pad", config))
    without = load(write(tmp_path / "no", config | {"pad_token_id": None}))
    expected = with_pad.apply_fn(with_pad.params, ids, mask)
    assert_equal(without.apply_fn(without.params, ids, mask), expected)
    hidden = with_pad.apply_fn(with_pad.params, ids, mask, output_hidden_states=True)[1][-1]
    last = hidden[np.arange(3), [8, 5, 8]]
    assert_equal(last @ with_pad.params["score.weight"].T, expected)
    unmasked = without.apply_fn(without.params, ids)
    assert_equal(unmasked[0], expected[0])


@first_of("qwen3", "qwen2, sliding", "roberta")
def test_transformations_agree(name, tmp_path):
    config = CONFIGS[name] | {"num_hidden_layers": 1, "max_window_layers": 0}
    apply_fn, params, _ = checkpoints.load(write(tmp_path, config))
    remat_fn = checkpoints.load(tmp_path, remat=True).apply_fn
    ids, mask = tokens(config)
    key = next(key for key in params if key.endswith(("v_proj.weight", "value.weight")))

    def loss(params, apply_fn=apply_fn):
        logits = apply_fn(params, ids, mask)
        weights = mask[..., None] if logits.shape[:2] == mask.shape else 1.0
        return jnp.mean(weights * jax.nn.log_softmax(logits) ** 2)

    def wave(leaf):
        return np.cos(np.arange(leaf.size)).astype(leaf.dtype).reshape(leaf.shape)

    tangent = jax.tree.map(wave, params)

    @compiled
    def derivatives(params):
        forward = jax.jvp(loss, (params,), (tangent,))
        remat_loss = partial(loss, apply_fn=remat_fn)
        return jax.value_and_grad(loss)(params), jax.value_and_grad(remat_loss)(params), forward

    reverse, remat_reverse, forward = derivatives(params)
    value, grad = reverse
    assert all(np.all(np.isfinite(leaf)) for leaf in grad.values())
    assert np.linalg.norm(grad[key]) > 1e-4
    assert_equal(value, compiled(loss)(params))
    slope = sum(jnp.vdot(grad[k], tangent[k]) for k in grad)
    assert_equal(forward, (value, slope), atol=1e-4)
    # Recomputing changes no figure.
    assert_equal(remat_reverse, reverse)

    @compiled
    def batched(params):
        scales = jnp.array([0.5, 1.0], jnp.float32)
        one = jax.vmap(lambda i, m: apply_fn(params, i[None], m[None])[0])
        several = jax.vmap(lambda scale: loss(params | {key: scale * params[key]}))
        return several(scales), one(jnp.asarray(ids), jnp.asarray(mask))

    several, one = batched(params)
    assert_equal(several[1], value)
    assert abs(several[0] - value) > 1e-4
    assert_equal(one, compiled(apply_fn)(params, ids, mask))


@first_of("qwen3", "roberta")
def test_the_attention_is_an_argument(name, tmp_path):
    seen = []

    def attention(query, key, value, bias=None, mask=None, *, is_causal=False):
        seen.append((query.shape, key.shape, None if mask is None else mask.shape))
        return 2 * jax.nn.dot_product_attention(query, key, value, bias, mask, is_causal=is_causal)

    config = CONFIGS[name]
    plain_fn, params, _ = load(write(tmp_path, config))
    apply_fn, _, _ = load(tmp_path, attention=attention)
    ids, mask = tokens(config)
    logits = apply_fn(params, ids, mask)
    assert np.max(abs(logits - plain_fn(params, ids, mask))) > 1e-2
    assert len(seen) == 2
    groups = config.get("num_key_value_heads", 4)
    head_dim = config.get("head_dim", 4)
    assert seen[0][:2] == ((3, 9, 4, head_dim), (3, 9, groups, head_dim))
    assert seen[0][2] == (3, 1, 1, 9)


@first_of("qwen3", "bert")
def test_half_precision(name, tmp_path):
    config = CONFIGS[name]
    exact_fn, exact_params, _ = load(write(tmp_path / "exact", config))
    ids, mask = tokens(config)
    exact = exact_fn(exact_params, ids, mask)
    apply_fn, params, _ = load(tmp_path / "exact", dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in params.values()} == {jnp.dtype("bfloat16")}
    logits, states = apply_fn(params, ids, mask, output_hidden_states=True)
    assert logits.dtype == jnp.float32
    assert states[-1].dtype == jnp.bfloat16
    # bfloat16 keeps eight bits: 2^-8 = 0.004 of the largest, a few times through two layers.
    # On average: single tokens of a random network can be sensitive.
    keep = mask == 1 if logits.shape[:2] == mask.shape else slice(None)
    assert np.mean(abs(logits - exact)[keep]) < 0.02 * np.max(abs(exact))
    # Stored so, read as stored or cast.
    stored = write(tmp_path / "half", config, dtype=jnp.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, load(stored).params, params)
    back = load(stored, dtype=jnp.float32).params
    assert {leaf.dtype for leaf in back.values()} == {jnp.dtype("float32")}


@first_of("llama", "qwen2, sliding", "qwen3", "roberta")
def test_shards(name, tmp_path):
    whole = load(write(tmp_path / "whole", CONFIGS[name]))
    shards = load(write(tmp_path / "shards", CONFIGS[name], num_files=3))
    assert list(whole.params) == list(shards.params)
    assert_equal(whole.params, shards.params, atol=0)
    (tmp_path / "shards" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks model-00002-of-00003.safetensors"):
        load(tmp_path / "shards")


def test_a_masked_language_model_is_read_as_its_body(tmp_path):
    """As the first BERTs were written: other names of the norms, a head and a pooler beside."""
    folder = write(tmp_path, BERT)
    weights = load_file(folder / "model.safetensors")
    body = checkpoints.load(folder, architecture="BertModel")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for name, value in weights.items()
        if not name.startswith("classifier")
    }
    old |= {
        "cls.predictions.bias": np.zeros(19, np.float32),
        "bert.embeddings.position_ids": np.arange(16)[None],
    }
    save_file(old, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(BERT | {"architectures": ["BertForMaskedLM"]}))
    with pytest.raises(ValueError, match="'BertForMaskedLM' is not supported.*BertModel"):
        checkpoints.load(folder)
    apply_fn, params, _ = checkpoints.load(folder, architecture="BertModel")
    assert "bert.embeddings.LayerNorm.gamma" in params
    assert not any("cls" in name or "pooler" in name for name in params)
    assert_equal(apply_fn(params, *tokens(BERT)), body.apply_fn(body.params, *tokens(BERT)))


REFUSED = {
    "GPT2LMHeadModel": (LLAMA | {"architectures": ["GPT2LMHeadModel"]}, "LlamaForCausalLM"),
    "which by `architecture`": (LLAMA | {"architectures": None}, "Qwen3Model"),
    "'longrope'": (LLAMA | rope(rope_type="longrope"), "default, linear, dynamic, llama3, yarn"),
    "'mrope'": (LLAMA | {"rope_scaling": {"type": "mrope"}}, "not supported"),
    "'llama3' lack low_freq": (LLAMA | rope(rope_type="llama3", factor=2.0), "high_freq_factor"),
    "partial_rotary_factor=0.5": (LLAMA | {"partial_rotary_factor": 0.5}, "only 1"),
    "differ by layer": (LLAMA | rope(full_attention={}), "not supported"),
    "turn pairs": (LLAMA | {"head_dim": 5}, "5 features"),
    "'gelu_fast'": (LLAMA | {"hidden_act": "gelu_fast"}, "silu"),
    "quantised": (LLAMA | {"quantization_config": {"quant_method": "gptq"}}, "gptq"),
    "chunked_attention": (QWEN3 | {"layer_types": 2 * ["chunked_attention"]}, "full_attention"),
    "wants a window": (QWEN2 | {"layer_types": 2 * ["sliding_attention"]}, "sliding_window=None"),
    "'relative_key'": (BERT | {"position_embedding_type": "relative_key"}, "only absolute"),
    "is_decoder=True": (BERT | {"is_decoder": True}, "only absolute"),
    "num_key_value_heads=3": (LLAMA | {"num_key_value_heads": 3}, "not a multiple"),
    "num_attention_heads=3": (BERT | {"num_attention_heads": 3}, "not a multiple"),
}


REFUSED |= {
    "rms_norm_eps in config.json must be positive": (LLAMA | {"rms_norm_eps": math.nan}, "nan"),
    "layer_norm_eps in config.json must be positive": (BERT | {"layer_norm_eps": -1.0}, "-1"),
    "num_hidden_layers=100000000": (LLAMA | {"num_hidden_layers": 10**8}, "of 2 layers"),
    "lacks hidden_size, vocab_size": (
        {name: value for name, value in BERT.items() if name not in ("hidden_size", "vocab_size")},
        "which Bert needs",
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_supported_is_refused_by_name(message, tmp_path):
    config, also = REFUSED[message]
    write(tmp_path, LLAMA if config["model_type"] == "llama" else BERT)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as caught:
        checkpoints.load(tmp_path)
    assert also in str(caught.value)


@pytest.mark.parametrize(
    ("config", "architecture", "family"),
    [
        (BERT, "RobertaModel", "Bert"),
        (ROBERTA, "BertModel", "Roberta"),
        (QWEN2, "LlamaModel", "Qwen2"),
    ],
)
def test_another_familys_weights_are_refused(config, architecture, family, tmp_path):
    """Their tensors have the same names and shapes, and mean something else."""
    folder = write(tmp_path, config)
    with pytest.raises(ValueError, match=f"model_type='{family.lower()}'.*of {family}"):
        checkpoints.load(folder, architecture=architecture)


def test_an_unknown_family_with_known_tensors_is_warned_of(tmp_path):
    """As Mistral's are Llama's, but for the window."""
    folder = write(tmp_path, LLAMA)
    (folder / "config.json").write_text(json.dumps(LLAMA | {"model_type": "mistral"}))
    with pytest.warns(UserWarning, match="model_type='mistral', which is none of llama, qwen2.*as"):
        checkpoints.load(folder)


@pytest.mark.parametrize("text", ["[]", "null", "{", "3"])
def test_a_configuration_that_is_none(text, tmp_path):
    write(tmp_path, BERT)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json (holds a|is not JSON)"):
        checkpoints.load(tmp_path)


def test_sizes_are_integers(tmp_path):
    write(tmp_path, BERT)
    (tmp_path / "config.json").write_text(json.dumps(BERT | {"hidden_size": "16"}))
    with pytest.raises(TypeError, match="hidden_size in config.json must be a positive integer"):
        checkpoints.load(tmp_path)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    folder = write(tmp_path, LLAMA)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"

    def rewritten(weights):
        save_file(weights, folder / "model.safetensors")
        return checkpoints.load(folder)

    with pytest.raises(ValueError, match=rf"missing are \['{name}'\]"):
        rewritten({k: v for k, v in weights.items() if k != name})
    bias = "model.layers.1.self_attn.k_proj.bias"
    with pytest.raises(ValueError, match=rf"unknown are \['{bias}'\]"):
        rewritten(weights | {bias: np.zeros(8, np.float32)})
    with pytest.raises(ValueError, match=rf"{name} has shape \(8, 4\).*wants \(8, 16\)"):
        rewritten(weights | {name: np.zeros((8, 4), np.float32)})
    with pytest.raises(ValueError, match="is int8: quantised"):
        rewritten(weights | {name: np.zeros((8, 16), np.int8)})
    # What older versions wrote beside the parameters is left out.
    old = {"model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    assert set(rewritten(weights | old).params) == set(weights)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="meta/llama has no config.json.*hub"):
        checkpoints.load("meta/llama")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor.*save_pretrained"):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize("file", ["../model.safetensors", "/model.safetensors", "a/b.safetensors"])
def test_an_index_that_points_out_of_its_folder_is_refused(file, tmp_path):
    folder = write(tmp_path / "inside", LLAMA, num_files=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = next(iter(index["weight_map"]))
    path.write_text(json.dumps(index | {"weight_map": index["weight_map"] | {first: file}}))
    with pytest.raises(ValueError, match="no file's name within it"):
        load(folder)


def test_without_safetensors(tmp_path, monkeypatch):
    write(tmp_path, LLAMA)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install 'probbp\[models\]'"):
        checkpoints.load(tmp_path)


def test_inputs_that_do_not_fit(tmp_path):
    apply_fn, params, _ = checkpoints.load(write(tmp_path, BERT))
    ids, mask = tokens(BERT)
    with pytest.raises(ValueError, match=r"input_ids are \(batch, time\) integers"):
        apply_fn(params, ids[0])
    with pytest.raises(ValueError, match=r"input_ids are \(batch, time\) integers"):
        apply_fn(params, ids.astype(float))
    with pytest.raises(ValueError, match=r"attention_mask must have the shape.*\(3, 9\)"):
        apply_fn(params, ids, mask[:1])
    with pytest.raises(ValueError, match="position_ids must have the shape"):
        apply_fn(params, ids, mask, position_ids=np.arange(9))
    with pytest.raises(ValueError, match="17 is longer than the 16 positions"):
        apply_fn(params, np.ones((1, 17), int))
    assert np.all(np.isnan(apply_fn(params, np.array([[3, 19]]))))


if __name__ == "__main__":
    import tempfile

    figures = {}
    for name, config in CONFIGS.items():
        with tempfile.TemporaryDirectory() as folder:
            logits, _ = run_transformers(write(Path(folder), config), *tokens(config))
        figures[name] = [float(f"{figure:.6g}") for figure in digest(logits)]
    lines = (f"  {json.dumps(name)}: {json.dumps(values)}" for name, values in figures.items())
    STORED.write_text("{\n" + ",\n".join(lines) + "\n}\n")
