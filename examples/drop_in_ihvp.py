"""The inverse-Hessian-vector product alone, dropped into a pipeline that has its own gradients and its own scores.

Run it from anywhere: python examples/drop_in_ihvp.py
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import pyinf

NO_TEXT = {"bos_token_id": 0, "eos_token_id": 0}  # random tokens here, so no begin and no end


def gradient(model: GPT2LMHeadModel, example: dict, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Your own code: the gradient of the summed loss of one sequence, ``[d_out, d_in + 1]`` a layer, bias last."""
    ids = example["input_ids"][None]
    loss = model(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1)
    names = list(parameters)
    grads = dict(zip(names, torch.autograd.grad(loss, [parameters[n] for n in names]), strict=True))
    layers = [n.removesuffix(".weight") for n in names if n.endswith(".weight")]
    # GPT-2's Conv1D keeps its weight as [d_in, d_out]
    return {n: torch.cat([grads[f"{n}.weight"].T, grads[f"{n}.bias"][:, None]], dim=1) for n in layers}


def main() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2, **NO_TEXT)).eval()
    train = [{"input_ids": torch.randint(0, 64, (16,))} for _ in range(40)]
    query = {"input_ids": train[7]["input_ids"].clone()}

    factors = pyinf.Attributor(model, method="ekfac", modules="*.mlp.*", fisher="empirical").fit(train).factors
    wanted = tuple(f"{name}." for name in factors.layers)
    parameters = {name: p for name, p in model.named_parameters() if name.startswith(wanted)}

    # One line between your gradients and your scores: V is [Q, d_out, d_in + 1], and so is what comes back.
    own = {name: g[None] for name, g in gradient(model, query, parameters).items()}
    preconditioned = factors.ihvp(own, damping=0.1)

    scores = torch.tensor(
        [
            sum(float((preconditioned[name][0] * g).sum()) for name, g in gradient(model, example, parameters).items())
            for example in train
        ]
    )
    print("strongest proponent:", int(scores.argmax()), "(the query is a copy of example 7)")

    attributor = pyinf.Attributor(model, method="ekfac", modules="*.mlp.*", fisher="empirical").fit(train)
    same = attributor.score([query], train).values[0]
    print(f"difference from pyinf's own scores: {float((scores - same).norm() / same.norm()):.1e}")


if __name__ == "__main__":
    main()
