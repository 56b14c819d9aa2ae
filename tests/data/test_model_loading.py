"""Models and tokenizers off the disk: safetensors only, an error with a remedy otherwise."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from tiny_tokenizers import make_tokenizer

from pyinf.data import load_model, load_tokenizer, model_limits
from pyinf.data.models import resolve_device
from pyinf.errors import ConfigError, ModelError


def tiny(**extra):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **extra))


@pytest.fixture
def folder(tmp_path):
    tiny().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_model_comes_back(folder):
    model = load_model(folder, device="cpu")
    assert not model.training and model.dtype == torch.float32
    assert torch.equal(model.lm_head.weight, tiny().lm_head.weight)
    assert model_limits(model) == (64, 32)
    assert load_model(folder, device="cpu", dtype="bfloat16").dtype == torch.bfloat16
    tiny(tie_word_embeddings=True).save_pretrained(folder)
    tied = load_model(folder, device="cpu")
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_bad_folders(folder, tmp_path):
    with pytest.raises(ModelError, match=r"no folder .*give the folder that save_pretrained wrote"):
        load_model(tmp_path / "none")
    with pytest.raises(ModelError, match="is a file"):
        load_model(folder / "config.json")
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_model(tmp_path)
    with pytest.raises(ModelError):
        load_model("a\0b")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    with pytest.raises(ModelError, match=r"cannot be loaded, its files are damaged.*save it again"):
        load_model(folder)
    weights.unlink()
    with pytest.raises(ModelError, match=r"holds no weights \(\*\.safetensors\)"):
        load_model(folder)
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(
        ModelError, match=r"only pickled weights \(pytorch_model\.bin\), which can run code and are not read"
    ):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json is damaged"):
        load_model(folder)


def test_missing_weights_are_not_made_up(folder):
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    del state["model.layers.0.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights in its files \(model\.layers\.0\.mlp\.up_proj\.weight"):
        load_model(folder)


def test_code_of_a_model_is_not_run(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config.update(model_type="strange", auto_map={"AutoConfig": "m.C", "AutoModelForCausalLM": "m.M"})
    (folder / "config.json").write_text(json.dumps(config))
    proof = tmp_path / "ran"
    (folder / "m.py").write_text(f"open({str(proof)!r}, 'w')")
    with pytest.raises(
        ModelError, match=r"brings its own code, which is not run unless asked for.*--trust-remote-code"
    ):
        load_model(folder)
    assert not proof.exists()


def test_adapters(folder, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(tiny(), config)
    home = tmp_path / "adapter"
    adapted.save_pretrained(home)
    model = load_model(folder, adapter=home, device="cpu")
    ids = torch.tensor([[1, 2, 3]])
    assert torch.allclose(model(ids).logits, adapted.eval()(ids).logits, atol=1e-6)
    with pytest.raises(ModelError, match="is an adapter, not a whole model; give its base with --model"):
        load_model(home)
    with pytest.raises(ModelError, match=r"has no adapter_config\.json"):
        load_model(folder, adapter=folder)
    (home / "adapter_model.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(ModelError, match="does not fit this model or is damaged"):
        load_model(folder, adapter=home)
    (home / "adapter_model.safetensors").unlink()
    torch.save({}, home / "adapter_model.bin")
    with pytest.raises(ModelError, match="only pickled weights"):
        load_model(folder, adapter=home)


def test_peft_missing(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match=r"needs peft; install it: pip install 'pyinf\[peft\]'"):
        load_model(folder, adapter=tmp_path)


def test_devices_and_dtypes(folder):
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="unknown device 'gpu7'"):
        resolve_device("gpu7")
    if not torch.cuda.is_available():
        assert resolve_device(None) == torch.device("cpu")
        with pytest.raises(ConfigError, match="sees no GPU; use --device cpu"):
            resolve_device("cuda:0")
    with pytest.raises(ConfigError, match="unknown dtype 'fp8'; use auto, float32"):
        load_model(folder, dtype="fp8")


def test_tokenizers(folder, tmp_path):
    assert load_tokenizer(folder, required=False) is None
    with pytest.raises(ModelError, match="holds no tokenizer; give the folder of one with --tokenizer"):
        load_tokenizer(folder)
    make_tokenizer().save_pretrained(folder)
    assert load_tokenizer(folder)("happy")["input_ids"] == make_tokenizer()("happy")["input_ids"]
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer .* damaged"):
        load_tokenizer(folder)


def test_hub_names_offline(tmp_path):
    code = (
        "from pyinf.data import load_model, load_tokenizer\nfrom pyinf.errors import ModelError\n"
        "for load in (load_model, load_tokenizer):\n"
        "    try:\n        load('no-such-owner/no-such-name')\n    except ModelError as e:\n        print(e)\n"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.count("no folder 'no-such-owner/no-such-name', and no") == 2, done.stderr
