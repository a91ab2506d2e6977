"""Names, random shapes, saved directories, refusals, and that the plain model stays plain."""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
import struct
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import probe
from probe.capture import SITES, CaptureSpec, Generation, Job, NonFinite, Reasoning, run_batch
from probe.errors import ModelUnavailable, ProbeError, UsageError
from probe.model import load, outline
from probe.model.attention import KVCache, Piece
from probe.model.edits import ResidualPatch
from probe.model.exact import in_float32
from probe.model.names import DEFAULT, aliases, ensure_available, resolve
from probe.model.shapes import SHAPES, byte_tokenizer, random_config, random_model
from probe.model.weights import weights_hash
from probe.prompts import Candidate, prompt_of
from probe.training.outline import causal_model, training_config
from tests.clock import within
from tests.conftest import TINY, tiny

# -- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "location", "revision"),
    [
        (DEFAULT, "wheel", DEFAULT, None),
        ("gemma-2b", "hub", "google/gemma-2b", None),
        ("pythia-70m", "hub", "EleutherAI/pythia-70m", None),
        ("org/name", "hub", "org/name", None),
        ("org/name@v1.2", "hub", "org/name", "v1.2"),
        ("gpt2-small@main", "hub", aliases()["gpt2-small"], "main"),
        ("random:gemma-2b", "random", "gemma-2b", None),
    ],
)
def test_a_name_resolves(name, kind, location, revision):
    source = resolve(name)
    assert (source.name, source.kind, source.location, source.revision) == (name, kind, location, revision)


def test_aliases_are_those_of_transformer_lens():
    from transformer_lens.supported_models import MODEL_ALIASES  # the library's own table, slow to import

    assert aliases() == {alias: hub_id for hub_id, names in MODEL_ALIASES.items() for alias in names}


def test_a_revision_given_apart_wins_over_the_one_in_the_name():
    assert resolve("org/name@a", "b").revision == "b"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("random:gema-2b", "did you mean gemma-2b?"),
        ("random:", "unknown shape"),
        ("./nowhere", "no such directory or file"),
        ("/nowhere.gguf", "not a .gguf file that exists"),
        ("a b", "not a model name"),
        ("a/b/c", "not a model name"),
        ("../x", "no such directory or file"),
        ("", "config.json"),
        ("https://example.org/x", "not a model name"),
        ("\x1b[31m", "not a model name"),
    ],
)
def test_a_name_that_means_nothing_is_refused_with_what_to_do(name, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelUnavailable, match=says.replace("?", r"\?").replace(".", r"\.")):
        resolve(name)


@pytest.mark.timing
@pytest.mark.parametrize("offline", [True, False])
def test_a_hub_model_that_cannot_be_had_is_refused_fast_with_every_way_out(offline, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nobody listens on the discard port
    began = time.monotonic()
    with pytest.raises(ModelUnavailable) as caught:
        ensure_available(resolve("gemma-2b"), offline)
    assert within(2, time.monotonic() - began)
    for way in (
        "hf auth login",
        "licence",
        "hf download google/gemma-2b",
        f"--model {DEFAULT}",
        "random:gemma-2b",
        "PATH",
    ):
        assert way in str(caught.value)


# -- random shapes -----------------------------------------------------------------------------------------------


def test_random_gemma_2b_has_the_real_parameter_count():
    assert outline("random:gemma-2b")["shape"]["n_params"] == 2_506_172_416


@pytest.mark.parametrize(
    ("name", "count"),
    # As published on each model's page; GPT-2's paper says 117M and 1542M, and its files hold these.
    [
        ("smollm2-135m", 134_515_008),
        ("smollm2-360m", 361_821_120),
        ("smollm2-1.7b", 1_711_376_384),
        ("gpt2", 124_439_808),
        ("gpt2-xl", 1_557_611_200),
        ("pythia-70m", 70_426_624),
        ("pythia-1b", 1_011_781_632),
        ("gemma-7b", 8_537_680_896),
    ],
)
def test_random_shapes_have_the_real_sizes(name, count):
    assert outline(f"random:{name}")["shape"]["n_params"] == count


def test_the_outline_says_what_the_loaded_model_says():
    for name in TINY:
        shape, facts = outline(f"random:{name}")["shape"], tiny(name).facts
        assert shape == {key: getattr(facts, key) for key in shape}


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2", "tiny-gemma"])
def test_random_weights_are_fixed_by_the_name_alone(name):
    torch.manual_seed(1)
    first = weights_hash(random_model(name, torch.float32))
    torch.manual_seed(2)
    torch.randn(3)
    assert weights_hash(random_model(name, torch.float32)) == first
    others = {weights_hash(random_model(other, torch.float32)) for other in TINY if other != name}
    assert first not in others


def test_no_norm_weight_and_no_bias_is_left_at_its_default():
    for name in TINY:
        for key, parameter in random_model(name, torch.float32).named_parameters():
            if parameter.ndim == 1:
                assert float(parameter.detach().std()) > 0.01, f"{name} {key}"


def test_a_different_weight_is_a_different_hash():
    model = random_model("tiny-llama", torch.float32)
    before = weights_hash(model)
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight[0, 0] += 1e-3
    assert weights_hash(model) != before
    assert weights_hash(random_model("tiny-llama", torch.bfloat16)) != before


# -- the byte tokenizer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [272, 50257])
def test_every_id_of_the_byte_tokenizer_decodes_to_text(size):
    tokenizer = byte_tokenizer(size)
    assert len(tokenizer) == size
    for token in range(size):
        assert tokenizer.decode([token])
    assert tokenizer.decode(list(range(size)))


def test_every_byte_round_trips_and_is_one_token():
    tokenizer = byte_tokenizer(272)
    for byte in range(128):
        ids = tokenizer(chr(byte), add_special_tokens=False)["input_ids"]
        assert len(ids) == 1
        assert tokenizer.decode(ids) == chr(byte)
    text = "".join(chr(c) for c in (0x80, 0x7FF, 0x800, 0xFFFF, 0x10000, 0x10FFFF))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


@settings(deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_text_round_trips_through_the_byte_tokenizer(text):
    tokenizer = tiny("tiny-llama").tokenizer
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


# -- loading -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A random tiny model saved by transformers."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    model = tiny("tiny-gemma")
    model.hf.save_pretrained(path)
    model.tokenizer.save_pretrained(path)
    return path


def logits_of_hf(hf) -> torch.Tensor:
    with torch.no_grad():
        return hf(torch.arange(5, 25)[None]).logits


def logits_of(model, text: str = "The same text.") -> torch.Tensor:
    with torch.no_grad():
        return model.hf(torch.tensor([model.codec.encode(text)])).logits


def test_a_saved_directory_loads_to_the_same_weights_logits_and_tokens(saved):
    model, again = tiny("tiny-gemma"), probe.load(str(saved))
    assert weights_hash(again.hf) == weights_hash(model.hf)
    assert torch.equal(logits_of(again), logits_of(model))
    text = "a <|im_end|> é 🙂"
    assert again.codec.encode(text) == model.codec.encode(text)
    assert again.tokenizer.chat_template == model.tokenizer.chat_template
    assert again.source.kind == "directory"
    assert again.facts == model.facts


def test_a_model_is_loaded_in_eval_mode_without_gradients_in_the_dtype_asked_for(saved):
    model = probe.load(str(saved), dtype="bfloat16")
    assert not model.hf.training
    assert model.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in model.hf.parameters())


def test_pickled_weights_are_refused_before_anything_reads_them(saved, tmp_path):
    path = tmp_path / "pickled"
    shutil.copytree(saved, path)
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    with pytest.raises(ModelUnavailable, match="pickled weights are never loaded"):
        probe.load(str(path))
    # Beside safetensors of another model's name nothing falls back to the pickle.
    shutil.copy(saved / "model.safetensors", path / "other.safetensors")
    with pytest.raises(ModelUnavailable):
        probe.load(str(path))


@pytest.mark.parametrize("damage", ["config", "no tokenizer", "weights", "shape", "remote code"])
def test_a_damaged_directory_is_refused_and_never_a_traceback(saved, tmp_path, damage):
    path = tmp_path / "damaged"
    shutil.copytree(saved, path)
    config = json.loads((path / "config.json").read_text())
    if damage == "config":
        (path / "config.json").write_text("{")
    elif damage == "no tokenizer":
        for file in path.glob("tokenizer*"):
            file.unlink()
        (path / "chat_template.jinja").unlink(missing_ok=True)
    elif damage == "weights":
        data = (path / "model.safetensors").read_bytes()
        (path / "model.safetensors").write_bytes(data[: len(data) // 2])
    elif damage == "shape":
        (path / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    else:
        (path / "config.json").write_text(
            json.dumps(
                {
                    "model_type": "novel",
                    "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.M"},
                }
            )
        )
        (path / "evil.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')")
    with pytest.raises(ModelUnavailable) as caught:
        probe.load(str(path))
    assert str(path) in str(caught.value)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda key, tensor: {} if key == "lm_head.weight" else {key: tensor}, "missing: lm_head.weight"),
        (
            lambda key, tensor: {} if "2.mlp.up_proj" in key else {key: tensor},
            "missing: .*2.mlp.up_proj.weight",
        ),
        (lambda key, tensor: {f"other.{key}": tensor}, "not used: other.lm_head.weight"),
        (
            lambda key, tensor: {key.replace("q_proj.weight", "q_proj.qweight"): tensor},
            "not used: .*0.self_attn.q_proj.qweight",
        ),
        (
            lambda key, tensor: (
                {key: tensor} | ({key[:-6] + "bias": tensor[:, 0].clone()} if "q_proj" in key else {})
            ),
            "not used: .*0.self_attn.q_proj.bias",
        ),
        (
            lambda key, tensor: {key: tensor[:5].clone() if "k_proj" in key else tensor},
            "another shape: .*k_proj",
        ),
    ],
)
def test_weights_that_are_not_the_configurations_are_refused_by_name(change, says, tmp_path):
    """transformers fills a missing weight with random numbers and leaves an unknown one out."""
    config = random_config("tiny-llama")
    config.tie_word_embeddings = False
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    byte_tokenizer(272).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    altered = {new: kept for key, tensor in stored.items() for new, kept in change(key, tensor).items()}
    save_file(altered, file, metadata={"format": "pt"})
    with pytest.raises(ModelUnavailable, match=says):
        probe.load(str(tmp_path))


def test_a_folder_that_describes_far_more_weights_than_it_holds_is_refused_before_they_are_made(
    saved, tmp_path
):
    path = tmp_path / "much"
    shutil.copytree(saved, path)
    config = json.loads((path / "config.json").read_text())
    sizes = {"num_hidden_layers": 100, "hidden_size": 8192, "intermediate_size": 32768}
    (path / "config.json").write_text(json.dumps(config | sizes | {"layer_types": None}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelUnavailable, match="most weights are missing"):
        probe.load(str(path))
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20
    )  # KiB; the model would take 300 GB


def test_layers_of_another_part_of_a_model_are_left_out_by_name(saved, tmp_path):
    path = tmp_path / "more"
    shutil.copytree(saved, path)
    file = path / "model.safetensors"
    save_file(load_file(file) | {"vision.patch.weight": torch.ones(2)}, file, metadata={"format": "pt"})
    heard: list[str] = []
    model = load(str(path), log=heard.append)
    assert torch.equal(logits_of_hf(model.hf), logits_of_hf(tiny("tiny-gemma").hf))
    assert any("vision.patch.weight" in line for line in heard)


_CLASSES = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoProcessor", "AutoImageProcessor")
_NAMED = {"auto_map": {name: "evil.T" for name in _CLASSES} | {"AutoTokenizer": ["evil.T", "evil.T"]}}
_TINY = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_EYES = _TINY | {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 16}
_TEXT = _TINY | {"model_type": "llama", "vocab_size": 272}
_OTHER = {
    "model_type": "t5",
    "d_model": 32,
    "d_ff": 32,
    "d_kv": 16,
    "num_layers": 1,
    "num_heads": 2,
    "vocab_size": 272,
}
FOLDERS: dict[str, dict[str, dict]] = {
    "each class by its name": {"config.json": _NAMED},
    "a tokenizer": {"tokenizer_config.json": _NAMED | {"tokenizer_class": "evil.T"}},
    "a processor": {"processor_config.json": _NAMED, "preprocessor_config.json": _NAMED},
    "how to generate": {"generation_config.json": _NAMED | {"custom_generate": "evil"}},
    # transformers has these, and no causal model of them: there it would ask.
    "a model of another sort": {"config.json": _NAMED | {"model_type": "t5"}},
    "a model of images": {"config.json": _NAMED | {"model_type": "vit"}},
    "a part of a model": {
        "config.json": {"model_type": "llava", "text_config": _OTHER | _NAMED, "vision_config": _EYES}
    },
    "the eyes of a model": {
        "config.json": {"model_type": "llava", "text_config": _TEXT, "vision_config": _EYES | _NAMED}
    },
    "attention of a hub": {"config.json": {"attn_implementation": "kernels-community/flash-attn2"}},
    "an adapter": {
        "adapter_config.json": {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
        | {"auto_mapping": {"base_model_class": "T", "parent_library": "evil"}}
        | {"megatron_config": {"x": 1}, "megatron_core": "evil"}
    },
}  # fmt: skip
"""What in a folder names code → files, whose keys are put over what they have."""


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_code_in_a_models_folder_runs_even_if_somebody_says_yes(saved, tmp_path, monkeypatch, folder):
    canary, path = tmp_path / "canary", tmp_path / "model"
    shutil.copytree(saved, path)
    for name, content in FOLDERS[folder].items():
        file = path / name
        before = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(before | content))
    code = f"open({str(canary)!r}, 'w').write('ran')\nclass T: pass\ndef generate(*_, **__): pass\n"
    (path / "custom_generate").mkdir()
    for name in ("evil.py", "T.py", "custom_generate/generate.py"):
        (path / name).write_text(code)
    if "adapter_config.json" in FOLDERS[folder]:
        (path / "adapter_config.json").write_text(
            json.dumps({**FOLDERS[folder]["adapter_config.json"], "base_model_name_or_path": str(saved)})
        )
        (path / "config.json").unlink()
        (path / "model.safetensors").rename(path / "adapter_model.safetensors")
    monkeypatch.chdir(path)
    monkeypatch.setattr("builtins.input", lambda *_: "y")

    def build(name):
        with torch.device("meta"):
            return causal_model(name, training_config(name))

    for read in (load, outline, training_config, build):
        with contextlib.suppress(ModelUnavailable):
            read(str(path))
    assert not canary.exists()


@pytest.mark.parametrize("named", ["AutoTokenizer", "AutoConfig", "AutoModelForCausalLM"])
def test_no_code_beside_a_gguf_file_runs_even_if_somebody_says_yes(tmp_path, monkeypatch, named):
    canary = tmp_path / "canary"
    entry = ["evil.T", None] if named == "AutoTokenizer" else "evil.T"
    for name, content in (("tokenizer_config.json", {}), ("config.json", {"model_type": "llama"})):
        (tmp_path / name).write_text(json.dumps(content | {"auto_map": {named: entry}}))
    (tmp_path / "evil.py").write_text(f"open({str(canary)!r}, 'w').write('ran')\nclass T: pass\n")
    key, value = b"general.architecture", b"llama"  # as much as makes transformers look at the folder
    metadata = struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, len(value)) + value
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + metadata)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for read in (load, outline, training_config):
        with contextlib.suppress(ModelUnavailable):  # its configuration can be read, the rest is not there
            read(str(tmp_path / "m.gguf"))
    assert not canary.exists()


@pytest.mark.parametrize(
    "content", [b"", b"GGUF", b"not gguf at all" * 100, b"GGUF\x03\x00\x00\x00" + b"\xff" * 64]
)
def test_a_file_that_is_no_gguf_is_refused(tmp_path, content):
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelUnavailable, match=r"bad\.gguf"):
        probe.load(str(path))
    with pytest.raises(ModelUnavailable, match=r"bad\.gguf"):
        outline(str(path))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"device": "tpu"}, "--device tpu"),
        ({"device": "cuda:99"}, "--device cuda:99"),
        ({"device": "cuda:x"}, "--device cuda:x"),
        ({"dtype": "int8"}, "--dtype int8"),
    ],
)
def test_an_impossible_device_or_dtype_is_a_usage_error(options, says):
    with pytest.raises(UsageError, match=says):
        load("random:tiny-llama", **options)


SMALL = {"vocab_size": 272, "hidden_size": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
UNFIT = {
    "bert": {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32, "is_decoder": True},
}


@pytest.mark.parametrize("kind", UNFIT)
def test_an_architecture_that_cannot_be_captured_faithfully_is_refused(kind, tmp_path):
    """It has no blocks beside its embedding; all families are tried in test_families.py."""
    config = AutoConfig.for_model(kind, **{**SMALL, **UNFIT[kind]})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    byte_tokenizer(272).save_pretrained(tmp_path)
    with pytest.raises(ModelUnavailable, match=rf"{kind}.*(cannot be captured|no list of blocks)"):
        probe.load(str(tmp_path))


def test_the_outline_of_a_model_without_attention_has_no_heads(tmp_path):
    config = AutoConfig.for_model("mamba", **SMALL, num_hidden_layers=2)
    config.save_pretrained(tmp_path)
    byte_tokenizer(272).save_pretrained(tmp_path)
    shape = outline(str(tmp_path))["shape"]
    assert (shape["n_layers"], shape["n_heads"], shape["n_kv_heads"], shape["d_head"]) == (2, 0, 0, 0)


# -- the plain model stays plain ---------------------------------------------------------------------------------


def test_the_plain_model_is_untouched_by_a_capture_even_one_that_fails(tiny_model):
    def state():
        hooks = sum(
            len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
            for m in tiny_model.hf.modules()
        )
        configs = [m.config._attn_implementation for m in tiny_model.hf.modules() if hasattr(m, "config")]
        return hooks, configs, weights_hash(tiny_model.hf), torch.is_grad_enabled()

    # Not zero hooks: transformers keeps its own once hidden states were asked for.
    before, logits = state(), logits_of(tiny_model)
    assert set(before[1]) <= {"sdpa", "eager"}
    tiny_model.capture("Some text.", max_new_tokens=3)
    tiny_model.score("Some", [" text", " more text"])
    assert state() == before
    assert torch.equal(logits_of(tiny_model), logits)

    def explode(*_):
        raise KeyError("boom")

    handle = tiny_model.blocks[1].register_forward_hook(explode)
    with pytest.raises(KeyError):
        tiny_model.capture("Some text.")
    handle.remove()
    assert state() == before
    assert torch.equal(logits_of(tiny_model), logits)


def test_the_plain_model_can_still_generate_and_be_trained():
    model = tiny("tiny-llama")
    model.capture("Warm up.", max_new_tokens=2)
    ids = torch.tensor([model.codec.encode("abc")])
    assert model.hf.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 6)


# -- the borders of the context ----------------------------------------------------------------------------------


def short_gpt2(n_ctx: int):
    """A tiny GPT-2 with learned positions for n_ctx tokens: one more is an index error."""
    config = random_config("tiny-gpt2")
    config.n_positions = n_ctx
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(config).eval()
    from probe.capture.model import CapturingModel
    from probe.model.names import Source

    return CapturingModel(hf, byte_tokenizer(272), Source("short", "random", "short"), {"resolved": "short"})


@pytest.mark.parametrize("asked", [1, 20, 1000])
@pytest.mark.parametrize("length", [5, 62, 63])
def test_generation_ends_with_the_context_and_never_in_an_error(asked, length):
    model = short_gpt2(64)
    model.codec.eos_ids = frozenset()
    outcome = model.capture("x" * length, max_new_tokens=asked)
    assert outcome.finish_reason == "length"
    assert 1 <= outcome.n_new <= asked
    assert len(outcome.token_ids) - 1 <= 64
    assert outcome.n_new == asked or len(outcome.token_ids) - 1 == 64


def test_long_candidates_fit_behind_a_prompt_that_fills_the_context_and_longer_ones_are_refused():
    model = short_gpt2(64)
    scores = model.score("x" * 33, ["y" * 30, "yz", "z"])
    assert len(scores) == 3
    assert all(-1000 < score.log_prob < 0 for score in scores)
    with pytest.raises(ProbeError, match="needs 65 tokens, the context has 64"):
        model.score("x" * 34, ["y" * 30, "yz", "z"])
    with pytest.raises(ProbeError, match="needs 65 tokens, the context has 64"):
        model.capture("x" * 64, max_new_tokens=1000)


def test_a_long_prompt_and_many_candidates_of_a_short_one_share_a_batch():
    model = tiny("tiny-llama")
    long, short = prompt_of("a long prompt " * 20, model.codec, 2), prompt_of("short", model.codec, 2)
    long.candidates = (Candidate("x", (50,)),)
    words = [f"candidate {n} of many" for n in range(20)]
    short.candidates = tuple(Candidate(word, tuple(model.codec.encode(word))) for word in words)
    outcomes = run_batch(
        model,
        model.codec,
        [Job(long, "long"), Job(short, "short")],
        CaptureSpec(frozenset({"logits"})),
        Generation(2),
    )
    assert not any(isinstance(outcome, NonFinite) for outcome in outcomes)
    alone = model.score("short", words)
    log_probs = outcomes[1].candidate_log_probs
    assert log_probs == pytest.approx([score.log_prob for score in alone], abs=1e-4)


def test_reasoning_that_announces_an_answer_late_stays_inside_its_memory():
    """The cue, then blanks, then the answer: the longest a chain of thought can get."""
    model = tiny("tiny-llama")
    prompt = prompt_of("Q", model.codec, 4)
    prompt.stop_ids = frozenset()
    blank, digit = model.codec.encode(" ")[0], model.codec.encode("7")[0]
    job = Job(prompt, "t", Reasoning("Answer:", answer_tokens=24, announces=lambda text: "Answer:" in text))
    emitted = 0

    def scripted(_module, _inputs, logits):
        nonlocal emitted
        token = blank if emitted < 22 else digit
        emitted += 1
        logits = torch.zeros_like(logits)
        logits[..., token] = 10
        return logits

    handle = model.hf.get_output_embeddings().register_forward_hook(scripted)
    try:
        (outcome,) = run_batch(model, model.codec, [job], CaptureSpec(frozenset(SITES)), Generation(4))
    finally:
        handle.remove()
    assert not isinstance(outcome, NonFinite)
    assert outcome.parsed["answer_forced"]
    assert outcome.finish_reason == "length"
    assert outcome.n_new <= job.most_new(4)
    assert outcome.tensors["keys"].shape[2] == outcome.n_prompt + outcome.n_new - 1


def test_every_shape_can_be_configured():
    for name in SHAPES:
        config = random_config(name)
        assert config.num_hidden_layers > 0


def test_what_an_instance_had_as_its_forward_is_put_back_when_stand_ins_are_undone(tiny_model):
    """As accelerate's, which moves the weights of a part to its device."""
    part = tiny_model.blocks[1]
    tokens = list(range(5, 17))
    usual = type(part).forward.__get__(part)
    part.forward = usual
    try:
        with in_float32(tiny_model.hf, tiny_model.decoder):
            assert part.__dict__["forward"] is not usual
        assert part.__dict__["forward"] is usual
        patch = ResidualPatch(1, torch.zeros(1, tiny_model.facts.d_model))
        with tiny_model.recording(None):
            cache = KVCache(1, len(tokens))
            tiny_model.forward([Piece(0, 0, tokens[:-1])], cache)
            tiny_model.step(tokens[-1:], cache, [len(tokens) - 1], patch=patch)
        assert part.__dict__["forward"] is usual
    finally:
        del part.forward
