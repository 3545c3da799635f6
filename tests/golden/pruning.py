"""What the authors' own code prunes: Wanda, SparseGPT, OWL, REAP and REAM on random layers; part of `make golden`.

Their repositories are no packages: clone them at the commits of `COMMITS` into `.cache/authors/NAME` first.
"""

import contextlib
import importlib
import io
import re
import sys
from copy import deepcopy
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
import transformers

AUTHORS = Path(__file__).parent.parent.parent / ".cache" / "authors"
COMMITS = {
    "wanda": ("locuslab/wanda", "8e8fc87"),
    "sparsegpt": ("IST-DASLab/sparsegpt", "147d215"),
    "OWL": ("luuyin/OWL", "dddb7a4"),
    "reap": ("CerebrasResearch/reap", "1970473"),
    "ream": ("SamsungSAILMontreal/ream", "84a3030"),
}
SOURCES = {name: f"{repository} {commit}" for name, (repository, commit) in COMMITS.items()}


@contextlib.contextmanager
def code_of(folder):
    """Import from a clone only, with what it needs for models and GPUs left out."""
    before = set(sys.modules)
    transformers.Conv1D = transformers.pytorch_utils.Conv1D
    torch.cuda.synchronize = lambda: None
    datasets = ModuleType("datasets")
    datasets.load_dataset = None
    sys.modules["datasets"] = datasets
    sys.path.insert(0, str(AUTHORS / folder))
    try:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            yield said
    finally:
        sys.path.pop(0)
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("lib", "quant", "sparsegpt", "reap", "ream", "data", "datasets"):
                del sys.modules[name]


class Layer(torch.nn.Module):
    """A block with one projection, whose output is thrown away."""

    def __init__(self, weight):
        super().__init__()
        self.projection = torch.nn.Linear(*weight.shape[::-1], bias=False)
        self.projection.weight.data = torch.tensor(weight)

    def forward(self, x, **_):
        self.projection(x)
        return (x,)


def prune_with(module, function, weights, x, sparsity, n=0, m=0, **options):
    """Prune a model of one projection per block by an author's function; the weights afterwards."""
    layers = torch.nn.ModuleList(Layer(weight) for weight in weights)
    model = SimpleNamespace(
        config=SimpleNamespace(use_cache=True),
        model=SimpleNamespace(layers=layers),
        seqlen=x.shape[1],
        hf_device_map={},
    )
    inputs = torch.tensor(x)
    module.get_loaders = lambda *_, **__: (None, None)
    module.prepare_calibration_input = lambda *_: (inputs.clone(), torch.zeros_like(inputs), None, None)
    args = SimpleNamespace(
        nsamples=len(x), seed=0, model="llama", sparsity_ratio=sparsity, use_variant=False, **options
    )
    torch.Tensor.cuda = lambda self: self
    getattr(module, function)(args, model, None, torch.device("cpu"), prune_n=n, prune_m=m)
    return [layer.projection.weight.data.numpy().copy() for layer in layers]


def make_pruning():
    """Kernels [inputs, outputs], calibration rows [rows, inputs], and what each method leaves."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    found = {}
    # Inputs that depend on each other, of very different sizes.
    x = draw(3, 40, 32) @ (draw(32, 32) * np.exp(draw(32)))[None].astype(np.float32) / 8
    w = draw(24, 32)
    found["layer"] = {"w": w.T, "x": x.reshape(-1, 32)}
    with code_of("wanda"), torch.no_grad():
        module = importlib.import_module("lib.prune")
        for name, (sparsity, n, m) in {"half": (0.5, 0, 0), "quarter": (0.75, 0, 0), "2:4": (0.5, 2, 4)}.items():
            (made,) = prune_with(module, "prune_wanda", [w], x, sparsity, n, m)
            found[f"wanda/{name}"] = made.T
    with code_of("sparsegpt"), torch.no_grad():
        module, quant = importlib.import_module("sparsegpt"), importlib.import_module("quant")
        cases = {"half": {"sparsity": 0.5}, "quarter": {"sparsity": 0.75}, "2:4": {"sparsity": 0.5, "prunen": 2}}
        cases |= {"half-4bit": {"sparsity": 0.5}, "2:4-4bit": {"sparsity": 0.5, "prunen": 2}, "dead": {"sparsity": 0.5}}
        for name, options in cases.items():
            rows = x.copy()
            if name == "dead":
                rows[..., 5] = 0
            layer = Layer(w).projection
            gpt = module.SparseGPT(layer)
            for one in rows:
                gpt.add_batch(torch.tensor(one), None)
            if name.endswith("4bit"):
                gpt.quantizer = quant.Quantizer()
                gpt.quantizer.configure(4, perchannel=True, sym=True, mse=False)
            hessian = gpt.H.clone().numpy()
            gpt.fasterprune(blocksize=8, prunem=4, **options)
            found[f"sparsegpt/{name}"] = {"hessian": hessian, "pruned": layer.weight.data.numpy().T.copy()}
    blocks = [draw(32, 32) * np.exp(spread * draw(32, 32)) for spread in (0.1, 0.6, 0.3, 1.0)]
    with code_of("OWL") as said, torch.no_grad(), np.printoptions(precision=17):
        module = importlib.import_module("lib.prune_all")
        blocks = [block.astype(np.float32) for block in blocks]
        prune_with(
            module,
            "prune_wanda_outlier",
            blocks,
            x,
            0.5,
            Hyper_m=3.0,
            Lamda=0.08,
            outlier_by_activation=False,
            outlier_by_wmetric=True,
        )
        before = re.findall(r"before adjustment \[(.*?)\]", said.getvalue(), re.DOTALL)[0]
        after = re.findall(r"after adjustment \[(.*?)\]", said.getvalue(), re.DOTALL)[0]
    found["owl"] = {
        "w": np.stack([block.T for block in blocks]),
        "percent": np.array([float(re.sub(r"[^\d.e-]", "", one.replace("float64", ""))) for one in before.split(",")]),
        "densities": np.array(after.split(), np.float64),
    }
    experts, tokens = 5, 30
    logits, outputs = torch.tensor(draw(tokens, experts)), torch.tensor(draw(experts, tokens, 6))
    chosen = torch.topk(logits[:, :4], 2).indices  # the last expert never
    with code_of("reap/src"):
        module = importlib.import_module("reap.pruning_metrics")
        state = module.initialize_pruning_state(experts)
        for part in (slice(0, 10), slice(10, tokens)):
            batch = {"activations": outputs[:, part], "selected_experts": chosen[part], "router_logits": logits[part]}
            module.update_pruning_state(state, num_experts=experts, **batch)
    found["reap"] = {
        "weights": torch.gather(torch.softmax(logits, 1), 1, chosen),
        "experts": chosen.numpy().astype(np.int32),
        "norms": torch.gather(torch.linalg.norm(outputs, dim=-1).T, 1, chosen),
        "saliency": state["reap"].mean,
        "load": state["expert_frequency"],
    }
    return found


class Expert(torch.nn.Module):
    """Qwen's SwiGLU expert, from kernels [D, F], [D, F], [F, D]."""

    def __init__(self, gate, up, down):
        super().__init__()
        for name, kernel in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
            layer = torch.nn.Linear(*kernel.shape, bias=False)
            layer.weight.data = torch.tensor(kernel.T.copy())
            setattr(self, name, layer)


def make_ream():
    """Groups of experts and merged experts: saliency, mean outputs, router logits, kernels, tokens the layer reads.

    The authors' code reduces the weights by a randomized PCA before it compares them; here they are compared whole.
    """
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    experts, tokens, width, ff, keep = 7, 40, 6, 5, 3
    outputs, logits, x = draw(experts, width), draw(tokens, experts) + 0.5, draw(tokens, width)
    saliency = np.array([0.3, 0.9, 0.1, 0.8, 0.0, 0.7, 0.2], np.float32)
    kernels = {"gate": draw(experts, width, ff), "up": draw(experts, width, ff), "down": draw(experts, ff, width)}
    for name, axis in (("gate", 1), ("up", 1), ("down", 0)):  # one is another in another order, and noise
        kernels[name][4] = kernels[name][1].take([3, 0, 4, 1, 2], axis=axis) + 0.01 * draw(*kernels[name][4].shape)
    found = {"outputs": outputs, "logits": logits, "x": x, "saliency": saliency} | kernels
    with code_of("ream"), torch.no_grad():
        package = importlib.import_module("ream.merger")
        weights = importlib.import_module("ream.weight_utils")
        group = importlib.import_module("ream.ream").pseudo_group
        for size in (3, 5):
            labels, first = group(saliency, torch.tensor(outputs)[:, None], keep, torch.tensor(logits), size)
            found[f"groups/{size}"] = np.asarray(first)[labels.astype(int)]
        modules = torch.nn.ModuleList(Expert(*(kernels[name][e] for name in kernels)) for e in range(experts))
        hidden = [
            torch.nn.functional.silu(one.gate_proj(torch.tensor(x))) * one.up_proj(torch.tensor(x)) for one in modules
        ]
        matrices = torch.stack([weights.ffn_weight_matrix(one) for one in modules])
        saliency = torch.tensor(np.where(saliency == 0, saliency[saliency > 0].min(), saliency))
        owner = SimpleNamespace(merging="logits+weights", device="cpu")
        for size in (3, 5):
            firsts = found[f"groups/{size}"]
            made = []
            for one in np.unique(firsts):
                members = [one, *np.flatnonzero((firsts == one) & (np.arange(experts) != one))]
                merge = package.Merger._merge
                made.append(merge(owner, deepcopy(modules), np.array(members), saliency, matrices, torch.stack(hidden)))
            for name in kernels:
                stack = [getattr(one, f"{name}_proj").weight.numpy().T for one in made]
                found[f"merged/{size}/{name}"] = np.stack(stack)
    return found
