"""Make the golden values: what PyTorch, transformers, peft and others compute on fixed inputs. Command: `make golden`.

Needs requirements/golden*.txt, for `pruning.npz` and `ream.npz` clones, and nothing of this project. Every `NAME.npz`
holds inputs and outputs as arrays named by paths (`rms_norm/3x5/x`); `huggingface/` and `lora/` hold whole directories;
`sources.json` says which version made what. Tests read them through the fixture `golden`.
"""

import importlib.metadata
import importlib.util
import json
import shutil
import sys
import types
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import peft
import pruning
import torch
import transformers
from mergekit.merge_methods.base import TensorGroup
from mergekit.merge_methods.registry import get as mergekit_method
from mergekit.merge_methods.slerp import slerp
from peft.utils.merge_utils import ties
from torch.nn import functional
from transformers.models.dbrx.modeling_dbrx import DbrxFFN
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4SparseMoeBlock
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeSparseMoeBlock
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashMoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMoE
from transformers.models.phimoe.modeling_phimoe import PhimoeSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.utils.chat_template_utils import render_jinja_template

HERE = Path(__file__).parent
COMMAND = "make golden"
SMOLLM2 = HERE.parent.parent / ".cache" / "smollm2"


def normal(*shape, seed=0):
    """Standard normal numbers, float32."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def tensors(*arrays, **options):
    """Arrays as tensors that share no memory with them."""
    return [torch.tensor(np.array(array), **options) for array in arrays]


def make_layers():
    """RMSNorm, attention with grouped queries (and its gradients), SwiGLU."""
    found = {}
    for shape in ((5,), (3, 5), (2, 3, 5)):
        x, gain = normal(*shape), normal(5, seed=1)
        found["rms_norm/" + "x".join(map(str, shape))] = {
            "x": x,
            "gain": gain,
            "y": functional.rms_norm(torch.tensor(x), (5,), torch.tensor(gain), eps=1e-5),
        }
    for causal, kv_heads in product((True, False), (1, 2, 4)):
        arrays = normal(2, 6, 4, 8), normal(2, 6, kv_heads, 8, seed=1), normal(2, 6, kv_heads, 8, seed=2)
        heads_first = [x.transpose(1, 2) for x in tensors(*arrays)]
        out = functional.scaled_dot_product_attention(*heads_first, is_causal=causal, enable_gqa=True).transpose(1, 2)
        found[f"attention/{'causal' if causal else 'full'}-{kv_heads}"] = dict(zip("qkv", arrays, strict=True), out=out)
    arrays = [normal(1, 5, heads, 4, seed=heads) for heads in (4, 2, 2)]
    leaves = tensors(*arrays, requires_grad=True)
    heads_first = [x.transpose(1, 2) for x in leaves]
    (functional.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True) ** 2).sum().backward()
    found["attention_gradients"] = dict(zip("qkv", arrays, strict=True)) | {
        f"d{name}": leaf.grad for name, leaf in zip("qkv", leaves, strict=True)
    }
    for shape in ((6,), (3, 6), (2, 3, 6)):
        arrays = normal(*shape), normal(6, 10, seed=1), normal(6, 10, seed=2), normal(10, 6, seed=3)
        x, gate, up, down = tensors(*arrays)
        found["swiglu/" + "x".join(map(str, shape))] = dict(zip(("x", "gate", "up", "down"), arrays, strict=True)) | {
            "y": (functional.silu(x @ gate) * (x @ up)) @ down
        }
    return found


def make_losses():
    """Cross-entropy with its gradient, and distillation (Hinton et al. 2015) less the teacher's entropy."""
    found = {}
    for shape, scale in product(((5,), (2, 3), (2, 3, 4)), (0.0, 1.0, 300.0)):
        generator = np.random.default_rng(0)
        logits = (scale * generator.normal(size=(*shape, 7))).astype(np.float32)
        labels = generator.integers(0, 7, shape).astype(np.int32)
        leaf = torch.tensor(logits, requires_grad=True)
        loss = functional.cross_entropy(leaf.flatten(0, -2), torch.tensor(labels).flatten().long())
        loss.backward()
        found[f"cross_entropy/{'x'.join(map(str, shape))}-{scale:g}"] = {
            "logits": logits,
            "labels": labels,
            "loss": loss,
            "gradient": leaf.grad,
        }
    student, teacher = normal(7, 5), normal(7, 5, seed=1)
    for temperature in (1.0, 4.0):
        one, two = (torch.tensor(x) / temperature for x in (student, teacher))
        soft = torch.softmax(two, 1)
        divergence = functional.kl_div(torch.log_softmax(one, 1), soft, reduction="batchmean")
        loss = temperature**2 * (divergence - (soft * soft.log()).sum(1).mean())
        found[f"distillation/{temperature:g}"] = {"student": student, "teacher": teacher, "loss": loss}
    return found


def make_convolutions():
    """Convolutions padded as TensorFlow's SAME, NHWC and HWIO."""
    found = {}
    for shape, stride in product(((3, 3, 5, 4), (1, 1, 5, 2), (2, 4, 5, 3)), (1, 2)):
        x, kernel = normal(2, 9, 8, 5), normal(*shape, seed=1)
        pads = [max((-(-n // stride) - 1) * stride + k - n, 0) for n, k in zip((9, 8), shape[:2], strict=True)]
        padded = np.pad(x, ((0, 0), *((p // 2, p - p // 2) for p in pads), (0, 0)))
        y = functional.conv2d(*tensors(padded.transpose(0, 3, 1, 2), kernel.transpose(3, 2, 0, 1)), stride=stride)
        found[f"{'x'.join(map(str, shape))}-{stride}"] = {"x": x, "kernel": kernel, "y": y.permute(0, 2, 3, 1)}
    return found


def make_lenet():
    """A small LeNet-300-100: outputs, and gradients of the sum of their squares."""
    images, names, sizes = normal(4, 3, 3, 1), ("dense0", "dense1", "output"), (9, 9, 5, 3)
    params, layers = {}, []
    for i, name in enumerate(names):
        kernel, bias = 0.4 * normal(*sizes[i : i + 2], seed=i + 1), 0.1 * normal(sizes[i + 1], seed=i + 10)
        params[name] = {"kernel": kernel, "bias": bias}
        linear = torch.nn.Linear(*kernel.shape)
        linear.weight.data, linear.bias.data = tensors(kernel.T, bias)
        layers += [linear, torch.nn.ReLU()]
    net = torch.nn.Sequential(torch.nn.Flatten(), *layers[:-1])
    out = net(torch.tensor(images))
    (out**2).sum().backward()
    grads = {
        name: {"kernel": at.weight.grad.T, "bias": at.bias.grad} for name, at in zip(names, net[1::2], strict=True)
    }
    return {"images": images, "params": params, "out": out, "gradients": grads}


# By name of ours: torch's class and its arguments.
OPTIMIZERS = {
    "momentum": ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "adam": ("Adam", {"lr": 0.01, "weight_decay": 0.01}),
    "adamw": ("AdamW", {"lr": 0.01, "weight_decay": 0.01}),
    "adagrad": ("Adagrad", {"lr": 0.1, "weight_decay": 0.01, "initial_accumulator_value": 0.1}),
    "rmsprop": ("RMSprop", {"lr": 0.01, "weight_decay": 0.01, "alpha": 0.9}),
    "adamax": ("Adamax", {"lr": 0.01, "weight_decay": 0.0}),
}


def make_optimizers():
    """Parameters of a network of two layers after 25 updates in float64."""
    x = normal(32, 6)
    y = np.tanh(x @ normal(6, 4, seed=1))
    params = {
        "dense": {"kernel": 0.4 * normal(6, 8, seed=2), "bias": np.zeros(8, np.float32)},
        "output": {"kernel": 0.4 * normal(8, 4, seed=3), "bias": np.full(4, 0.1, np.float32)},
    }
    found = {"x": x, "y": y, "params": params}
    for name, (kind, arguments) in OPTIMIZERS.items():
        w1, b1, w2, b2 = leaves = tensors(
            *(leaf for layer in params.values() for leaf in layer.values()), dtype=torch.float64, requires_grad=True
        )
        optimizer = getattr(torch.optim, kind)(leaves, **arguments)
        inputs, targets = tensors(x, y, dtype=torch.float64)
        for _ in range(25):
            optimizer.zero_grad()
            ((torch.tanh(inputs @ w1 + b1) @ w2 + b2 - targets) ** 2).mean().backward()
            optimizer.step()
        found[f"after/{name}"] = {"dense": {"kernel": w1, "bias": b1}, "output": {"kernel": w2, "bias": b2}}
    return found


DECODERS = {
    "default": {},
    "untied": {"tied": False, "head_dim": 6, "rope_theta": 50.0},
    "multi-query": {"kv_heads": 1},
}


def make_decoders():
    """Logits of Llama's architecture, written in torch's own functions, float64."""
    vocab, layers, width, heads, ff = 11, 2, 16, 4, 24
    tokens = np.random.default_rng(5).integers(0, vocab, (2, 7)).astype(np.int32)
    found = {"tokens": tokens}
    for name, changes in DECODERS.items():
        c = {"tied": True, "head_dim": width // heads, "rope_theta": 1e4, "kv_heads": 2, "eps": 1e-6} | changes
        h, k = c["head_dim"], c["kv_heads"]
        shapes = {
            "blocks/attention/query/kernel": (layers, width, heads, h),
            "blocks/attention/key/kernel": (layers, width, k, h),
            "blocks/attention/value/kernel": (layers, width, k, h),
            "blocks/attention/output/kernel": (layers, heads, h, width),
            "blocks/mlp/gate/kernel": (layers, width, ff),
            "blocks/mlp/up/kernel": (layers, width, ff),
            "blocks/mlp/down/kernel": (layers, ff, width),
        }
        params = {path: 0.25 * normal(*shape, seed=i) for i, (path, shape) in enumerate(shapes.items())}
        # Gains away from one, so that leaving one out would show.
        for i, path in enumerate(("blocks/attention_norm/gain", "blocks/mlp_norm/gain", "final_norm/gain")):
            params[path] = 1.5 + 0.1 * normal(*(layers, width)[i == 2 :], seed=20 + i)
        params["embed/table"] = 0.25 * normal(vocab, width, seed=30)
        if not c["tied"]:
            params["head/kernel"] = 0.25 * normal(width, vocab, seed=31)
        found[name] = {"params": params, "logits": decoder_logits(params, tokens, c, width, layers)}
    return found


def decoder_logits(params, tokens, c, width, layers):
    """Embedding, pre-norm blocks with rotary positions and SwiGLU, head."""
    p = {path: torch.tensor(leaf, dtype=torch.float64) for path, leaf in params.items()}
    half = c["head_dim"] // 2
    angle = torch.arange(tokens.shape[1])[:, None] * c["rope_theta"] ** (-torch.arange(half) / half)
    turn = torch.polar(torch.ones_like(angle, dtype=torch.float64), angle.double())[:, None]

    def rotate(x):
        z = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat([z.real, z.imag], -1)

    def norm(x, gain):
        return functional.rms_norm(x, (width,), gain, c["eps"])

    def split(x, kernel):
        return (x @ kernel.flatten(1)).unflatten(-1, kernel.shape[1:])

    x = functional.embedding(torch.tensor(tokens).long(), p["embed/table"])
    for i in range(layers):
        block = {path.removeprefix("blocks/"): leaf[i] for path, leaf in p.items() if path.startswith("blocks/")}
        y = norm(x, block["attention_norm/gain"])
        q, k, v = (split(y, block[f"attention/{name}/kernel"]) for name in ("query", "key", "value"))
        q, k, v = (z.transpose(1, 2) for z in (rotate(q), rotate(k), v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
        x = x + y.flatten(2) @ block["attention/output/kernel"].flatten(0, 1)
        y = norm(x, block["mlp_norm/gain"])
        gate, up, down = (block[f"mlp/{name}/kernel"] for name in ("gate", "up", "down"))
        x = x + (functional.silu(y @ gate) * (y @ up)) @ down
    head = p["embed/table"].T if c["tied"] else p["head/kernel"]
    return norm(x, p["final_norm/gain"]) @ head


WIDTH, FF = 6, 5


def packed(get, experts=None):
    """Kernels of experts stored as [E, 2 F, D], the gate first, and [E, D, F]."""
    gate, up = get("experts.gate_up_proj")[:experts].transpose(1, 2).chunk(2, -1)
    return {
        "gate": {"kernel": gate},
        "up": {"kernel": up},
        "down": {"kernel": get("experts.down_proj").transpose(1, 2)},
    }


def interleaved(get):
    """gpt-oss: gate and up alternate in [E, D, 2 F], with biases."""
    both, biases = get("experts.gate_up_proj"), get("experts.gate_up_proj_bias")
    down = {"kernel": get("experts.down_proj"), "bias": get("experts.down_proj_bias")}
    cut = {name: {"kernel": both[..., i::2], "bias": biases[..., i::2]} for i, name in enumerate(("gate", "up"))}
    return {**cut, "down": down}


def inputs_first(get):
    """Llama 4: [E, D, 2 F] and [E, F, D]."""
    gate, up = get("experts.gate_up_proj").chunk(2, -1)
    return {"gate": {"kernel": gate}, "up": {"kernel": up}, "down": {"kernel": get("experts.down_proj")}}


def flattened(get):
    """DBRX: [E F, D] each."""
    gate, up, down = (get(f"experts.mlp.{name}").unflatten(0, (-1, FF)) for name in ("w1", "v1", "w2"))
    names = {"gate": gate.transpose(1, 2), "up": up.transpose(1, 2), "down": down}
    return {name: {"kernel": kernel} for name, kernel in names.items()}


def ungated(get):
    """Nemotron-H: [E, F, Z] and [E, Z, F]."""
    return {name: {"kernel": get(f"experts.{name}_proj").transpose(1, 2)} for name in ("up", "down")}


def shared(get, name, parts):
    """The shared experts."""
    return {part: {"kernel": get(f"{name}.{part}_proj.weight").T} for part in parts}


class Family(NamedTuple):
    """One feed-forward block of transformers and where it has the parameters of `moe.layer.MoE`."""

    block: type
    config: object
    router: str
    experts: Callable = packed
    bias: str = ""
    shared: str = ""
    arguments: tuple = ()

    def tree(self, get):
        """Parameters (or gradients) by the names of `moe.layer.MoE`, from a function of transformers' names."""
        found = {"router": {"kernel": get(f"{self.router}.weight").T}, "experts": self.experts(get)}
        if self.bias:
            bias = get(self.bias).flatten()
            found["router"]["logit_bias" if self.bias == f"{self.router}.bias" else "bias"] = bias
        if self.shared:
            found["shared"] = shared(get, self.shared, found["experts"])
        if self.block is NemotronHMoE:
            for ours, theirs in (("latent_in", "fc1_latent_proj"), ("latent_out", "fc2_latent_proj")):
                found[ours] = {"kernel": get(f"{theirs}.weight").T}
        if self.block is Qwen2MoeSparseMoeBlock:
            found["shared_gate"] = {"kernel": get("shared_expert_gate.weight").T}
        return found


SIZES = {"hidden_size": WIDTH, "num_experts_per_tok": 2, "experts_implementation": "eager"}


def mixtral(**changes):
    """A configuration of Mixtral."""
    sizes = {"intermediate_size": FF, "num_local_experts": 4, "router_jitter_noise": 0.0}
    return transformers.MixtralConfig(**SIZES | sizes | changes)


def deepseek_v3(**changes):
    """A configuration of DeepSeek-V3, eight experts in four groups."""
    sizes = {"moe_intermediate_size": FF, "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "n_shared_experts": 2}
    return transformers.DeepseekV3Config(**SIZES | sizes | {"num_experts_per_tok": 3} | changes)


FAMILIES = {
    "mixtral": Family(MixtralSparseMoeBlock, mixtral(), "gate"),
    "geglu": Family(MixtralSparseMoeBlock, mixtral(hidden_act="gelu"), "gate"),
    "reglu": Family(MixtralSparseMoeBlock, mixtral(hidden_act="relu"), "gate"),
    "qwen2_moe": Family(
        Qwen2MoeSparseMoeBlock,
        transformers.Qwen2MoeConfig(
            **SIZES,
            moe_intermediate_size=FF,
            shared_expert_intermediate_size=2 * FF,
            num_experts=4,
            norm_topk_prob=False,
        ),
        "gate",
        shared="shared_expert",
    ),
    "gpt_oss": Family(
        GptOssMLP,
        transformers.GptOssConfig(
            **SIZES, intermediate_size=FF, num_local_experts=4, swiglu_alpha=1.3, swiglu_limit=1.5
        ),
        "router",
        interleaved,
        bias="router.bias",
    ),
    "llama4": Family(
        Llama4TextMoe,
        transformers.Llama4TextConfig(**SIZES, intermediate_size=FF, num_local_experts=4),
        "router",
        inputs_first,
        shared="shared_expert",
    ),
    "deepseek_v3": Family(
        DeepseekV3MoE,
        deepseek_v3(norm_topk_prob=True, routed_scaling_factor=2.5),
        "gate",
        bias="gate.e_score_correction_bias",
        shared="shared_experts",
    ),
    "deepseek_v3_unnormalized": Family(
        DeepseekV3MoE,
        deepseek_v3(norm_topk_prob=False, routed_scaling_factor=1.5),
        "gate",
        bias="gate.e_score_correction_bias",
        shared="shared_experts",
    ),
    "dbrx": Family(
        DbrxFFN,
        transformers.DbrxConfig(
            d_model=WIDTH,
            ffn_config={
                "hidden_size": WIDTH,
                "ffn_hidden_size": FF,
                "moe_num_experts": 4,
                "moe_top_k": 2,
                "moe_normalize_expert_weights": 2.0,
            },
        ),
        "router.layer",
        flattened,
    ),
    "ernie4_5": Family(
        Ernie4_5_MoeSparseMoeBlock,
        transformers.Ernie4_5_MoeConfig(
            hidden_size=WIDTH,
            moe_intermediate_size=FF,
            moe_num_experts=4,
            moe_k=2,
            moe_num_shared_experts=2,
            experts_implementation="eager",
        ),
        "gate",
        bias="gate.moe_statics.e_score_correction_bias",
        shared="shared_experts",
    ),
    "deepseek_v4": Family(
        DeepseekV4SparseMoeBlock,
        transformers.DeepseekV4Config(
            **SIZES,
            num_hidden_layers=1,
            moe_intermediate_size=FF,
            n_routed_experts=4,
            mlp_layer_types=["moe"],
            scoring_func="sqrtsoftplus",
            routed_scaling_factor=1.5,
            swiglu_limit=1.5,
        ),
        "gate",
        bias="gate.e_score_correction_bias",
        shared="shared_experts",
        arguments=(0,),
    ),
    "longcat": Family(
        LongcatFlashMoE,
        transformers.LongcatFlashConfig(
            hidden_size=WIDTH,
            expert_ffn_hidden_size=FF,
            n_routed_experts=4,
            zero_expert_num=2,
            moe_topk=3,
            routed_scaling_factor=1.5,
            experts_implementation="eager",
        ),
        "router.classifier",
        partial(packed, experts=4),
        bias="router.e_score_correction_bias",
    ),
    "nemotron_h": Family(
        NemotronHMoE,
        transformers.NemotronHConfig(
            hidden_size=WIDTH,
            moe_latent_size=4,
            moe_intermediate_size=FF,
            moe_shared_expert_intermediate_size=2 * FF,
            n_routed_experts=8,
            num_experts_per_tok=3,
            n_group=4,
            topk_group=2,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
            mlp_hidden_act="relu2",
            experts_implementation="eager",
        ),
        "gate",
        ungated,
        bias="gate.e_score_correction_bias",
        shared="shared_experts",
    ),
    "phimoe": Family(
        PhimoeSparseMoeBlock,
        transformers.PhimoeConfig(**SIZES, intermediate_size=FF, num_local_experts=4, router_jitter_noise=0.4),
        "router",
    ),
}


def make_families():
    """Feed-forward blocks of families of models: outputs, and gradients of a weighted sum of them."""
    found, cotangent = {}, normal(2, 6, WIDTH, seed=100)
    for name, family in FAMILIES.items():
        block = family.block(family.config, *family.arguments).eval()
        leaves = dict(block.named_parameters()) | dict(block.named_buffers())
        with torch.no_grad():
            for i, leaf in enumerate(leaves.values()):
                leaf.copy_(torch.tensor(0.5 * normal(*leaf.shape, seed=i + 1)))
        x = torch.tensor(normal(2, 6, WIDTH), requires_grad=True)
        out = block(x)
        out = (out[0] if isinstance(out, tuple) else out).reshape(x.shape)
        (out * torch.tensor(cotangent)).sum().backward()

        def gradient(leaf, leaves=leaves):
            return torch.zeros_like(leaves[leaf]) if leaves[leaf].grad is None else leaves[leaf].grad

        found[name] = {
            "params": family.tree(leaves.__getitem__),
            "x": x,
            "out": out,
            "dx": x.grad,
            "gradients": family.tree(gradient),
        }
    return found | {"cotangent": cotangent}


def make_merging():
    """Differences of four experts merged by TIES (peft); three models and their base merged by mergekit's methods."""
    deltas = normal(4, 6, 10)
    found = {
        f"ties/{density:g}": {"deltas": deltas, "merged": ties(tensors(*deltas), torch.ones(4), density)}
        for density in (0.5, 0.2)
    }
    base, models = normal(6, 10, seed=1), normal(3, 6, 10, seed=2)
    group = TensorGroup.from_tensors(tensors(base, *models), base_index=0)
    mergekit = {"base": base, "models": models}
    for name, own in {"ties": (0.5, 0.3, 0.2), "task_arithmetic": (1.0, -0.5, 0.3)}.items():
        method = mergekit_method(name)
        each = {"weight": dict(enumerate(own, 1)), "density": dict.fromkeys((1, 2, 3), 0.37)}
        shared = {"int8_mask": False, "normalize": name == "ties", "rescale": False, "lambda": 0.7}
        mergekit[name] = {"weights": np.array(own), "merged": method.merge_group(group, **each, **shared)}
    pairs = [(models[0], 2 * models[1]), (models[0], -1.5 * models[0])]
    mergekit["slerp"] = {
        str(i): {
            "stack": np.stack(pair),
            "merged": slerp(torch.tensor([0.3]), *(one[None] for one in tensors(*pair)))[0],
        }
        for i, pair in enumerate(pairs)
    }
    return found | {"mergekit": mergekit}


LORA = {
    "llama": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj", "down_proj"]},
    "qwen2": {"r": 3, "lora_alpha": 5.0, "use_rslora": True, "target_modules": ["k_proj", "v_proj", "up_proj"]},
}
"""Adapters of models of `MODELS`; of the first every layer, of the second the last one."""


def make_lora():
    """LoRA adapters that peft writes, the logits with them, and one kernel that they were merged into.

    `exported_config.json` is what we write for the same adapter (a test says so); here peft reads the same tensors with
    it and must compute the same logits to the last bit.
    """
    tokens = np.random.default_rng(0).integers(0, 64, (2, 9))
    found = {"tokens": tokens.astype(np.int32)}
    for name, settings in LORA.items():
        torch.manual_seed(1)
        base = transformers.AutoModelForCausalLM.from_pretrained(HERE / "huggingface" / name)
        only = {} if name == "llama" else {"layers_to_transform": [1]}
        model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings, **only)).eval()
        for path, parameter in model.named_parameters():
            if "lora_" in path:
                torch.nn.init.normal_(parameter, 0.0, 0.3)
        directory = HERE / "lora" / name
        model.peft_config["default"].base_model_name_or_path = name
        model.save_pretrained(directory)
        (directory / "README.md").unlink()
        with torch.no_grad():
            logits = model(torch.tensor(tokens)).logits
            copy = HERE / "lora" / "copy"
            exported = HERE / "lora" / f"{name}.exported_config.json"
            if exported.exists():
                shutil.copytree(directory, copy)
                shutil.copy(exported, copy / "adapter_config.json")
                fresh = transformers.AutoModelForCausalLM.from_pretrained(HERE / "huggingface" / name)
                again = peft.PeftModel.from_pretrained(fresh, copy).eval()(torch.tensor(tokens)).logits
                shutil.rmtree(copy)
                assert torch.equal(again, logits), f"{name}: peft reads another adapter from our configuration"
            merged = model.merge_and_unload()
            kernel = merged.model.layers[1].mlp
            kernel = (kernel.down_proj if name == "llama" else kernel.up_proj).weight.T.contiguous()
        found[name] = {"logits": logits, "merged": kernel}
    return found


MODELS = {
    "llama": ("Llama", {"rope_theta": 5e4, "head_dim": 16}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 7}),
    "llama-linear": (
        "Llama",
        {"attention_bias": True, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 2e4}},
    ),
    "llama-3.1": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 100.0,
                "factor": 8.0,
                "low_freq_factor": 0.5,
                "high_freq_factor": 3.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "mistral": ("Mistral", {"sliding_window": 5, "rms_norm_eps": 1e-4}),
    "qwen2": (
        "Qwen2",
        {
            "rope_theta": 1e6,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
        },
    ),
    "qwen3": (
        "Qwen3",
        {
            "head_dim": 16,
            "attention_bias": True,
            "rms_norm_eps": 1e-3,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 100.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 2.0,
                "beta_slow": 0.5,
            },
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "hidden_size": 16,
            "head_dim": 12,
            "num_experts": 4,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 8,
            "norm_topk_prob": True,
            "rope_theta": 100.0,
            "rms_norm_eps": 1e-2,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "hidden_size": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 24,
            "rope_theta": 100.0,
            "rms_norm_eps": 1e-2,
        },
    ),
    "qwen2_moe-normalized": (
        "Qwen2Moe",
        {
            "hidden_size": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 8,
            "norm_topk_prob": True,
            "qkv_bias": False,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2_moe-dense-layers": (
        "Qwen2Moe",
        {
            "hidden_size": 16,
            "num_hidden_layers": 6,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 8,
            "mlp_only_layers": [0, 1],
            "decoder_sparse_step": 2,
        },
    ),
    "qwen3_moe-dense-layers": (
        "Qwen3Moe",
        {
            "hidden_size": 16,
            "head_dim": 4,
            "num_hidden_layers": 3,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "norm_topk_prob": True,
            "attention_bias": True,
            "mlp_only_layers": [0],
        },
    ),
    "olmo2": (
        "Olmo2",
        {
            "hidden_size": 16,
            "intermediate_size": 24,
            "head_dim": 6,
            "rms_norm_eps": 1e-2,
            "attention_bias": True,
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0},
            "eos_token_id": 3,
        },
    ),
    "olmoe": (
        "Olmoe",
        {
            "hidden_size": 16,
            "intermediate_size": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "rope_theta": 100.0,
            "rms_norm_eps": 1e-2,
            "eos_token_id": 3,
        },
    ),
    "olmoe-normalized": (
        "Olmoe",
        {
            "hidden_size": 16,
            "intermediate_size": 8,
            "num_key_value_heads": None,
            "num_experts": 4,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "eos_token_id": 3,
        },
    ),
    "gemma2": (
        "Gemma2",
        {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 3,
            "head_dim": 6,
            "rms_norm_eps": 1e-2,
            "rope_theta": 100.0,
            "attention_bias": True,
            "query_pre_attn_scalar": 10,
            "sliding_window": 5,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3_text": (
        "Gemma3Text",
        {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 4,
            "head_dim": 6,
            "rms_norm_eps": 1e-2,
            "query_pre_attn_scalar": 10,
            "sliding_window": 3,
            "layer_types": [f"{kind}_attention" for kind in ("sliding", "sliding", "full", "sliding")],
            "final_logit_softcapping": 3.0,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 200.0},
            },
        },
    ),
    "smollm3": (
        "SmolLM3",
        {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 3,
            "rms_norm_eps": 1e-2,
            "attention_bias": True,
            "no_rope_layers": [0, 1, 1],
            "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 100.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 3,
        },
    ),
    "phi3": (
        "Phi3",
        {
            "intermediate_size": 24,
            "rms_norm_eps": 1e-2,
            "sliding_window": 6,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
            "pad_token_id": 0,
            "eos_token_id": 3,
        },
    ),
    "gpt_oss": (
        "GptOss",
        {
            "hidden_size": 16,
            "intermediate_size": 8,
            "num_hidden_layers": 3,
            "head_dim": 6,
            "rms_norm_eps": 1e-2,
            "sliding_window": 5,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "swiglu_alpha": 1.3,
            "swiglu_limit": 0.7,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 100.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 2.0,
                "beta_slow": 0.5,
                "truncate": False,
            },
        },
    ),
    "deepseek_v2": (
        "DeepseekV2",
        {
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "q_lora_rank": 12,
            "kv_lora_rank": 10,
            "qk_nope_head_dim": 6,
            "qk_rope_head_dim": 4,
            "v_head_dim": 5,
            "intermediate_size": 24,
            "moe_intermediate_size": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 1.5,
            "topk_method": "group_limited_greedy",
            "n_group": 2,
            "topk_group": 1,
            "rms_norm_eps": 1e-2,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 100.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 2.0,
                "beta_slow": 0.5,
                "mscale": 0.7,
                "mscale_all_dim": 1.3,
            },
        },
    ),
    "deepseek_v2-greedy": (
        "DeepseekV2",
        {
            "hidden_size": 16,
            "num_key_value_heads": 4,
            "q_lora_rank": None,
            "kv_lora_rank": 10,
            "qk_nope_head_dim": 6,
            "qk_rope_head_dim": 4,
            "v_head_dim": 12,
            "moe_intermediate_size": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 3,
            "n_shared_experts": 1,
            "tie_word_embeddings": True,
            "rope_theta": 100.0,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "q_lora_rank": 12,
            "kv_lora_rank": 10,
            "qk_nope_head_dim": 6,
            "qk_rope_head_dim": 4,
            "v_head_dim": 5,
            "intermediate_size": 24,
            "moe_intermediate_size": 8,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 1.5,
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": False,
            "rms_norm_eps": 1e-2,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 100.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "mscale": 0.7,
                "mscale_all_dim": 1.3,
            },
        },
    ),
}


# Rotary entries of a config.json in every place where transformers looks for them: model, entries in place of its own.
ROTARY = {
    "llama3, original length beside": (
        "olmo2",
        {
            "rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 0.5, "high_freq_factor": 3.0},
            "rope_theta": 100.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "yarn, original length beside": (
        "olmo2",
        {
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0},
            "original_max_position_embeddings": 16,
        },
    ),
    "yarn, two original lengths": (
        "olmo2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 100.0,
                "factor": 4.0,
                "original_max_position_embeddings": 8,
            },
            "original_max_position_embeddings": 32,
        },
    ),
    "old entries and new": (
        "olmo2",
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 7.0},
            "rope_scaling": {"type": "linear", "factor": 2.0},
            "rope_theta": 100.0,
        },
    ),
    "two kinds": ("olmo2", {"rope_parameters": {"type": "linear", "rope_type": "default", "rope_theta": 100.0}}),
    "null for the family's": ("gpt_oss", {"rope_parameters": None, "rope_scaling": None, "rope_theta": 100.0}),
    "two sets from old entries": (
        "gemma3_text",
        {
            "rope_parameters": None,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
            "rope_theta": 100.0,
            "rope_local_base_freq": 10.0,
            "original_max_position_embeddings": 8,  # which one set would take
        },
    ),
}


def make_rotary(tokens):
    """Last logits of models of `huggingface/` with the rotary entries of `ROTARY`, which go to `rotary.json`."""
    (HERE / "huggingface" / "rotary.json").write_text(json.dumps(ROTARY, indent=1) + "\n")
    found, copy = {}, HERE / "huggingface" / "copy"
    for name, (model, entries) in ROTARY.items():
        shutil.copytree(HERE / "huggingface" / model, copy)
        settings = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(settings | entries))
        with torch.no_grad():
            found[name] = transformers.AutoModelForCausalLM.from_pretrained(copy).eval()(tokens).logits[:, -1]
        shutil.rmtree(copy)
    return found


def make_huggingface():
    """Directories that transformers writes, and their logits.

    `exported_config.json` beside them is what our export writes for the same model (a test says so); here transformers
    reads the same tensors with that configuration and must compute the same logits to the last bit. `defaults.json`
    holds what transformers takes for entries that a config.json leaves out.
    """
    kinds = sorted({kind for kind, _ in MODELS.values()})
    defaults = [getattr(transformers, f"{kind}Config")().to_dict() for kind in kinds]
    text = json.dumps({one["model_type"]: one for one in defaults}, indent=1, sort_keys=True)
    (HERE / "huggingface" / "defaults.json").write_text(text + "\n")
    tokens = np.random.default_rng(0).integers(0, 64, (3, 12))
    found = {"tokens": tokens.astype(np.int32)}
    for name, (kind, more) in MODELS.items():
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(
            **{
                "vocab_size": 64,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 64,
            }
            | more
        )
        architecture = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")
        model = architecture(config).eval()
        if name not in ("llama", "llama-tied", "mixtral"):
            buffers = [one for one in model.named_buffers() if "correction_bias" in one[0]]
            for path, parameter in [*model.named_parameters(), *buffers]:
                # Biases start at 0 and gains at 1 (Gemma's at 0), where they cannot be told from absent ones.
                if parameter.ndim == 1 or path.endswith("proj_bias"):
                    torch.nn.init.normal_(parameter, float("norm" in path and "gemma" not in name), 0.5)
                elif kind not in ("Llama", "Mistral", "Qwen2", "Qwen3"):  # 0.02 at first: scores and routers near zero
                    torch.nn.init.normal_(parameter, 0.0, 0.4)
        directory = HERE / "huggingface" / name
        model.save_pretrained(directory)
        (directory / "generation_config.json").unlink()
        with torch.no_grad():
            found[name] = logits = model(torch.tensor(tokens)).logits
            drawn = torch.tensor(tokens)
            for _ in range(6):
                drawn = torch.cat([drawn, model(drawn).logits[:, -1:].argmax(-1)], 1)
            found[f"{name}.greedy"] = drawn[:, tokens.shape[1] :].int()
        exported = HERE / "huggingface" / f"{name}.exported_config.json"
        if exported.exists():
            copy = HERE / "huggingface" / "copy"
            shutil.copytree(directory, copy)
            shutil.copy(exported, copy / "config.json")
            with torch.no_grad():
                again = architecture.from_pretrained(copy).eval()(torch.tensor(tokens)).logits
            shutil.rmtree(copy)
            assert torch.equal(again, logits), f"{name}: transformers reads another model from our configuration"
    return found | {"rotary": make_rotary(torch.tensor(tokens))}


def module_of(package, path, **stubs):
    """One file of an installed package without the package's imports; `stubs` stand for modules that it imports."""
    for name, content in stubs.items():
        sys.modules[name.replace("__", ".")] = content
    file = Path(importlib.metadata.distribution(package).locate_file(path))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pack_gptq(weight, bits, group, *, order=False, symmetric=False, second=False):
    """A projection [outputs, inputs] packed by auto_gptq, and what that library multiplies by."""
    outputs, inputs = weight.shape
    rng = np.random.default_rng(outputs * inputs)
    place = torch.tensor(rng.permutation(inputs) if order else np.arange(inputs))  # in the order of activations
    g_idx = (place // group).int()
    limit, half = 2**bits - 1, 2 ** (bits - 1)
    scales, zeros = [], []
    for j in range(inputs // group):
        part = weight[:, g_idx == j]
        low, high = part.min(1).values.clamp(max=0), part.max(1).values.clamp(min=0)
        one = 2 * part.abs().max(1).values / limit if symmetric else (high - low) / limit
        scales.append(one.half().float())
        zeros.append(torch.full_like(one, half) if symmetric else (-low / scales[-1]).round().clamp(1, limit))
    scales_OJ, zeros_OJ = torch.stack(scales, 1), torch.stack(zeros, 1)
    index = g_idx.long()
    steps = (weight / scales_OJ[:, index] + zeros_OJ[:, index]).round().clamp(0, limit)
    linear = torch.nn.Linear(inputs, outputs, bias=False)
    linear.weight.data = (steps - zeros_OJ[:, index]) * scales_OJ[:, index]
    library = module_of("auto_gptq", "auto_gptq/nn_modules/qlinear/qlinear_cuda.py")
    layer = library.QuantLinear(bits, group, inputs, outputs, False)
    layer.pack(linear, scales_OJ.clone(), zeros_OJ.clone(), g_idx)
    with torch.no_grad():
        dense = layer(torch.eye(inputs)).T
    found = {name: getattr(layer, name) for name in ("qweight", "qzeros", "g_idx")} | {"scales": layer.scales.half()}
    if second:  # zero points as they are, where the first format has them less 1 (gptqmodel/utils/model.py)
        found["qzeros"] += {4: 0x11111111, 8: 0x01010101}[bits]
        found.pop("g_idx")
    return found, dense


def pack_awq(weight, group):
    """A projection packed by AutoAWQ, and what that library multiplies by."""
    outputs, inputs = weight.shape
    parts = weight.reshape(outputs, -1, group)
    low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
    scales = ((high - low) / 15).half().float()
    zeros = (-low / scales).round().clamp(0, 15)
    linear = torch.nn.Linear(inputs, outputs, bias=False)
    wide_scales, wide_zeros = (one.repeat_interleave(group, 1) for one in (scales, zeros))
    linear.weight.data = ((weight / wide_scales + wide_zeros).round().clamp(0, 15) - wide_zeros) * wide_scales
    packing = module_of("autoawq", "awq/utils/packing_utils.py")
    stubs = {
        "awq__utils__module": types.SimpleNamespace(try_import=lambda name: (None, "")),
        "awq__utils__utils": types.SimpleNamespace(get_best_device=lambda: "cpu"),
        "awq__utils__packing_utils": packing,
    }
    library = module_of("autoawq", "awq/modules/linear/gemm.py", **stubs)
    scales_JO, zeros_JO = scales.T.contiguous(), zeros.T.contiguous()
    layer = library.WQLinear_GEMM.from_linear(linear, 4, group, scales=scales_JO, zeros=zeros_JO)
    found = {name: getattr(layer, name) for name in ("qweight", "qzeros", "scales")}
    dense = packing.dequantize_gemm(found["qweight"], found["qzeros"], found["scales"].float(), 4, group)
    return found, dense.T


def pack_compressed(weight, **weights):
    """A projection packed by compressed-tensors, and what that library multiplies by."""
    from compressed_tensors import quantization
    from compressed_tensors.compressors.naive_quantized import FloatQuantizationCompressor, IntQuantizationCompressor
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    arguments = quantization.QuantizationArgs(**weights)
    outputs, inputs = weight.shape
    state = {"weight": weight.clone()}
    parts = weight.reshape(outputs, -1, weights.get("group_size") or inputs)
    whole = weights["strategy"] == "tensor"
    low, high = (parts.min()[None, None], parts.max()[None, None]) if whole else (parts.amin(-1), parts.amax(-1))
    state["weight_scale"], state["weight_zero_point"] = calculate_qparams(low, high, arguments)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=arguments)
    eight = IntQuantizationCompressor if weights["type"] == "int" else FloatQuantizationCompressor
    library = PackedQuantizationCompressor if weights["num_bits"] == 4 else eight
    found = library.compress(state, scheme)
    return found, library.decompress(found, scheme)["weight"]


def pack_fp8(weight, block):
    """A projection in float8 with a scale for every block, and what transformers multiplies by (it reads it below)."""
    parts = weight.reshape(weight.shape[0] // block, block, weight.shape[1] // block, block)
    scales = parts.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
    values = (parts / scales[:, None, :, None]).reshape(weight.shape).to(torch.float8_e4m3fn)
    dense = (values.float().reshape(parts.shape) * scales[:, None, :, None]).reshape(weight.shape)
    return {"weight": values, "weight_scale_inv": scales}, dense


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8}
FLOAT8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": False, "sym": False}


def compressed(**weights):
    """quantization_config of compressed-tensors for all projections but the head."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    kind = "pack-quantized" if weights["num_bits"] == 4 else f"{weights['type']}-quantized"
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


QUANTIZED = {
    "gptq": ("Llama", GPTQ, partial(pack_gptq, bits=4, group=8)),
    "gptq-act-order": ("Mixtral", GPTQ | {"desc_act": True}, partial(pack_gptq, bits=4, group=8, order=True)),
    "gptq-v2": (
        "Phi3",
        GPTQ | {"bits": 8, "group_size": 16, "checkpoint_format": "gptq_v2", "sym": True},
        partial(pack_gptq, bits=8, group=16, symmetric=True, second=True),
    ),
    "awq": (
        "Mixtral",
        {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True},
        partial(pack_awq, group=16),
    ),
    "int4": ("Llama", compressed(**INT4, symmetric=True), partial(pack_compressed, **INT4, symmetric=True)),
    "int4-asymmetric": (
        "Llama",
        compressed(**INT4, symmetric=False),
        partial(pack_compressed, **INT4, symmetric=False),
    ),
    "int8": ("Llama", compressed(**INT8, symmetric=True), partial(pack_compressed, **INT8, symmetric=True)),
    "int8-tensor": (
        "Llama",
        compressed(**INT8 | {"strategy": "tensor"}, symmetric=False),
        partial(pack_compressed, **INT8 | {"strategy": "tensor"}, symmetric=False),
    ),
}


QUANTIZED |= {
    "float8": ("Llama", compressed(**FLOAT8, symmetric=True), partial(pack_compressed, **FLOAT8, symmetric=True)),
    "fp8": (
        "Llama",
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]},
        partial(pack_fp8, block=16),
    ),
}


def make_quantized():
    """Directories with packed weights, and logits of transformers with what their libraries unpack."""
    from safetensors.torch import load_file, save_file

    tokens = np.random.default_rng(0).integers(0, 64, (3, 12))
    found = {"tokens": tokens.astype(np.int32)}
    for name, (kind, entry, pack) in QUANTIZED.items():
        torch.manual_seed(0)
        sizes = {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        }
        more = {"pad_token_id": 0} if kind == "Phi3" else {"num_local_experts": 2} if kind == "Mixtral" else {}
        model = getattr(transformers, f"{kind}ForCausalLM")(
            getattr(transformers, f"{kind}Config")(**sizes | more, rope_theta=100.0)
        ).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, 0.0, 0.4)
        directory = HERE / "huggingface" / "quantized" / name
        model.save_pretrained(directory)
        (directory / "generation_config.json").unlink()
        packed, dense = {}, {}
        for path, tensor in load_file(directory / "model.safetensors").items():
            if tensor.ndim < 2 or "embed" in path or "lm_head" in path or path.endswith("gate.weight"):
                packed[path] = tensor.half()
                dense[path] = packed[path].float()
                continue
            parts, dense[path] = pack(tensor)
            packed |= {f"{path.removesuffix('weight')}{part}": one.contiguous() for part, one in parts.items()}
        plain = HERE / "huggingface" / "copy"
        shutil.copytree(directory, plain)
        save_file(
            {path: one.detach().contiguous() for path, one in dense.items()},
            plain / "model.safetensors",
            {"format": "pt"},
        )
        model = type(model).from_pretrained(plain).eval()
        shutil.rmtree(plain)
        save_file(packed, directory / "model.safetensors", {"format": "pt"})
        settings = json.loads((directory / "config.json").read_text()) | {"quantization_config": entry}
        (directory / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        with torch.no_grad():
            found[name] = logits = model(torch.tensor(tokens)).logits
            drawn = torch.tensor(tokens)
            for _ in range(6):
                drawn = torch.cat([drawn, model(drawn).logits[:, -1:].argmax(-1)], 1)
        found[f"{name}.greedy"] = drawn[:, tokens.shape[1] :].int()
        read = {"compressed-tensors": "CompressedTensorsConfig", "fp8": "FineGrainedFP8Config"}
        if way := read.get(entry["quant_method"]):  # the others need a GPU there
            how = getattr(transformers, way)(dequantize=True)
            read = type(model).from_pretrained(directory, quantization_config=how, dtype=torch.float32)
            with torch.no_grad():
                again = read.eval()(torch.tensor(tokens)).logits
            torch.testing.assert_close(again, logits, atol=2e-4, rtol=0)
    return found


def make_smollm2():
    """SmolLM2-135M-Instruct (`make smollm2`): losses of 20,480 tokens of these documents, and greedy continuations."""
    model = transformers.AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(SMOLLM2)
    root = HERE.parent.parent
    text = "".join(path.read_text() for path in (root / "LICENSE", *sorted((root / "docs").glob("*.md"))))[:90_000]
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    prompts = {"chat": asked, "story": "Once upon a time, in a village by the sea, there lived"}
    found = {
        "text": np.frombuffer(text.encode(), np.uint8),
        "tokens": np.asarray(tokenizer(text).input_ids[: 40 * 513], np.uint16),
    }
    windows = found["tokens"].astype(np.int64).reshape(40, 513)
    losses = []
    with torch.no_grad():
        for row in torch.tensor(windows):
            logits = model(row[None, :-1]).logits[0]
            losses.append(functional.cross_entropy(logits, row[1:], reduction="mean").item())
        for name, prompt in prompts.items():
            tokens = torch.tensor([tokenizer(prompt).input_ids])
            out = model.generate(tokens, do_sample=False, max_new_tokens=200)[0, tokens.shape[1] :]
            found[name] = {"prompt": np.frombuffer(prompt.encode(), np.uint8), "tokens": np.asarray(out, np.uint16)}
    return found | {"losses": np.asarray(losses)}


TEXTS = (
    "The cat sat on the mat, and the mat was flat.\n",
    "def f(x):\n    return x + 1  # naïve café — 東京 🙂\n",
    "  Two  spaces, CAPITALS, 3.14159 and\ttabs; don't-break? <|endoftext|>",
    "",
)


def make_tokenizers():
    """Three tokenizer.json as families of models have them: GPT-2's bytes, Llama's and T5's Unigram, BERT's WordPiece.

    Each has a template that puts special tokens around a text, and the last one truncates and pads.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    corpus = [text * 4 for text in TEXTS] + [(HERE.parent.parent / "LICENSE").read_text()[:6000]]
    found, folder = {}, HERE / "tokenizers"
    folder.mkdir(exist_ok=True)

    def add(name, inner, trainer, template):
        inner.train_from_iterator(corpus, trainer)
        special = [(word, inner.token_to_id(word)) for word in template.split() if word.startswith(("<", "["))]
        inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
        if name == "wordpiece":
            inner.enable_truncation(8)
            inner.enable_padding()
        inner.save(str(folder / f"{name}.json"))
        fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / f"{name}.json"))
        tokens = {str(i): np.asarray(fast(text, add_special_tokens=False).input_ids) for i, text in enumerate(TEXTS)}
        found[name] = tokens

    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": 400, "show_progress": False}
    trainer = trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], **options)
    add("bytelevel", inner, trainer, "<|endoftext|> $A")
    inner = tokenizers.Tokenizer(models.Unigram())
    inner.normalizer = normalizers.NFKC()
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", **options)
    add("unigram", inner, trainer, "<s> $A </s>")
    inner = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], **options)
    add("wordpiece", inner, trainer, "[CLS] $A [SEP]")
    return found


CHATML = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n' }}
    {%- endif %}
    {{- 'Functions:' }}
    {%- for tool in tools %}
        {{- '\\n' }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '\\nCall one as <tool_call>\\n{"name": ..., "arguments": ...}\\n</tool_call><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(count=0) %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- if not loop.first %}
            {{- raise_exception('the system speaks first') }}
        {%- endif %}
        {%- continue %}
    {%- endif %}
    {%- set ns.count = ns.count + 1 %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {% generation %}
        {{- message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {% endgeneration %}
    {%- else %}
        {{- message.content | trim }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
INSTRUCTIONS = """{{ bos_token }}
{% for message in messages %}
    {% if loop.index > 4 %}
        {% break %}
    {% endif %}
    {% if message['role'] == 'user' %}
[INST] {{ message['content'] }} [/INST]
    {% else %}
 {{ message['content'] }}{{ eos_token }}
    {% endif %}
{% endfor %}
{{ messages | length | tojson }} {{ {'b': 'ä<', 'a': [1, none]} | tojson(indent=2) }}
"""
TOOL = {
    "name": "add",
    "description": "Adds <two> numbers & says 'é'.",
    "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
}
CHATS = {
    "plain": [{"role": "user", "content": "  two\n lines "}],
    "system": [{"role": "system", "content": "Be <b>brief</b>."}, {"role": "user", "content": 'Say "é{{ 1 }}".'}],
    "turns": [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(["user", "assistant"] * 2 + ["user"])],
    "calls": [
        {"role": "user", "content": "2 + 3?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": [3, "ü"]}}}],
        },
        {"role": "tool", "content": "5"},
    ],
}


def make_chats():
    """Prompts of chats by templates with all that authors of templates use."""
    found = []
    for (form, template), (name, messages) in product(
        {"chatml": CHATML, "instructions": INSTRUCTIONS}.items(), CHATS.items()
    ):
        for tools in (None, [{"type": "function", "function": TOOL}]):
            if tools and form == "instructions":
                continue
            texts, _ = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=template,
                add_generation_prompt=True,
                bos_token="<s>",
                eos_token="</s>",
            )
            found.append(
                {"template": template, "messages": messages, "tools": tools, "text": texts[0], "name": f"{form}-{name}"}
            )
    return found


SPECIAL = {  # tokenizer_config.json, special_tokens_map.json
    "of the tokenizer": (
        {"bos_token": "a", "eos_token": "b", "pad_token": {"__type": "AddedToken", "content": "c"}},
        None,
    ),
    "none": ({"bos_token": None}, None),
    "of the older file": ({"bos_token": "a"}, {"bos_token": "d", "eos_token": {"content": "e"}}),
    "of the newer file": ({"bos_token": "a", "added_tokens_decoder": {}}, {"bos_token": "d", "eos_token": "e"}),
}
SPECIAL_TEMPLATE = "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}|{{ bos_token is defined }}"


def make_special_tokens():
    """Prompts with the special tokens of a tokenizer's files, which are not those of config.json."""
    found = []
    for name, (settings, older) in SPECIAL.items():
        directory = HERE / "tokenizer"
        directory.mkdir()
        shutil.copy(HERE / "tokenizers" / "bytelevel.json", directory / "tokenizer.json")
        settings = settings | {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": SPECIAL_TEMPLATE}
        files = {"tokenizer_config.json": settings} | ({"special_tokens_map.json": older} if older else {})
        for file, content in files.items():
            (directory / file).write_text(json.dumps(content))
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        text = tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
        shutil.rmtree(directory)
        found.append({"name": name, "files": files, "text": text})
    return found


def flat(tree, path=""):
    """Nested mappings and tensors as one mapping from paths to arrays."""
    if isinstance(tree, dict):
        return {
            key: leaf for name in tree for key, leaf in flat(tree[name], f"{path}/{name}" if path else name).items()
        }
    return {path: tree.detach().numpy() if isinstance(tree, torch.Tensor) else np.asarray(tree)}


def version(package):
    """A package and its version."""
    return f"{package} {importlib.metadata.version(package)}"


TORCH, TRANSFORMERS, PEFT = (f"{lib.__name__} {lib.__version__}" for lib in (torch, transformers, peft))
FILES = {
    "convolutions": (make_convolutions, TORCH),
    "decoders": (make_decoders, TORCH),
    "families": (make_families, TRANSFORMERS),
    "huggingface": (make_huggingface, TRANSFORMERS),
    "layers": (make_layers, TORCH),
    "lenet": (make_lenet, TORCH),
    "losses": (make_losses, TORCH),
    "lora": (make_lora, PEFT),
    "merging": (make_merging, f"{PEFT}, {version('mergekit')}"),
    "optimizers": (make_optimizers, TORCH),
    "pruning": (pruning.make_pruning, ", ".join(one for name, one in pruning.SOURCES.items() if name != "ream")),
    "ream": (pruning.make_ream, pruning.SOURCES["ream"]),
    "quantized": (make_quantized, ", ".join(map(version, ("auto_gptq", "autoawq", "compressed_tensors")))),
    "smollm2": (make_smollm2, TRANSFORMERS),
    "tokenizers": (make_tokenizers, TRANSFORMERS),
}


def main():
    """Write every file beside this one."""
    torch.set_num_threads(1)
    for name, (make, _) in FILES.items():
        if name == "smollm2" and not SMOLLM2.exists():
            print(f"smollm2.npz stays as it is: no {SMOLLM2} (make smollm2)")
            continue
        if name in ("pruning", "ream") and not pruning.AUTHORS.exists():
            print(f"{name}.npz stays as it is: no {pruning.AUTHORS}, see tests/golden/pruning.py")
            continue
        np.savez_compressed(HERE / f"{name}.npz", **flat(make()))
    sources = {f"{name}.npz": {"source": source, "command": COMMAND} for name, (_, source) in FILES.items()}
    (HERE / "chats.json").write_text(json.dumps(make_chats(), indent=1) + "\n")
    (HERE / "special_tokens.json").write_text(json.dumps(make_special_tokens(), indent=1) + "\n")
    for name in ("chats.json", "special_tokens.json"):
        sources[name] = {"source": TRANSFORMERS, "command": COMMAND}
    sources["tokenizers/"] = {"source": TRANSFORMERS, "command": COMMAND}
    sources["lora/"] = {"source": PEFT, "command": COMMAND}
    sources["huggingface/"] = {"source": TRANSFORMERS, "command": COMMAND}
    sources["huggingface/quantized/"] = sources["quantized.npz"]
    (HERE / "sources.json").write_text(json.dumps(sources, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
