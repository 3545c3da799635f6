"""One engine that reads prompts and decodes, in a process that `scripts.benchmarks.decode` starts and asks.

`python engines.py ENGINE MODEL BITS` loads the model and answers every line "prefill N" or "decode SLOTS TOKENS" (this
project also "texts SLOTS TEXTS PROMPT TOKENS DRAFTED") on its standard input with a line of JSON: seconds of the clock
and of the process, and the tokens drawn. Runs in any environment that has the engine: tessera (this project),
transformers, or llama_cpp.
"""

import json
import sys
import time
from collections.abc import Callable

PROMPT = 64  # tokens that every slot has before it decodes; these are not timed
LENGTH = 512


def tokens_of(count: int) -> list[int]:
    """A prompt: any tokens do, and all engines read the same."""
    return [1000 + 37 * i % 5000 for i in range(count)]


class Tessera:
    """This project: the compiled programs that its engine calls, a call a token."""

    def __init__(self, model: str, bits: int):
        from sharding.inference.quantize import QuantConfig
        from sharding.plan import Plan
        from tessera.serving.load import SourceConfig, load
        from tessera.serving.quantized import quantise_decoder
        from tessera.serving.served import serve

        loaded = load(SourceConfig(model, dtype="float32"))
        params = loaded.params
        if bits:
            params = quantise_decoder(params, loaded.config, QuantConfig(bits, group=64 if bits == 4 else 0))
        self.params, self.served = serve(params, loaded.config, Plan(""), "float32")
        self.tokenizer = loaded.tokenizer
        self.made: dict = {}

    def programs(self, slots: int):
        """Programs of so many slots and their parameters."""
        from tessera.serving.programs import ServeConfig, make_programs

        if slots not in self.made:
            made = make_programs(self.served, ServeConfig(slots=slots, length=LENGTH, chunk=256))
            self.params = made.place(self.params)
            self.made[slots] = made, self.params
        return self.made[slots]

    def prefill(self, count: int) -> Callable[[], list[int]]:
        """A prompt read by one slot, up to its next token."""
        import numpy as np

        from tessera.serving.programs import Rows

        programs, params = self.programs(1)
        row = [np.zeros(1, np.int32), np.zeros(1, np.int32), np.full(1, count, np.int32)]
        state, chunk = programs.start(), Rows(np.asarray([tokens_of(count)], np.int32), *row)

        def run() -> list[int]:
            _, drawn = programs.extend(params, state, chunk, fresh=True)
            return np.asarray(drawn.tokens).tolist()

        return run

    def decode(self, slots: int, count: int) -> Callable[[], list[int]]:
        """Tokens of every slot, each the input of the next."""
        import numpy as np

        from sharding.inference.sample import greedy

        programs, params = self.programs(slots)
        prompts = np.asarray([tokens_of(PROMPT)] * slots, np.int32)
        state, logits = programs.prefill(params, prompts, np.full(slots, PROMPT, np.int32))
        first = np.asarray(logits).argmax(-1).astype(np.int32)
        settings, budget = greedy(slots), np.ones(slots, np.int32)

        def run() -> list[int]:
            last, found, now = first, [int(first[0])], state
            for _ in range(count):
                now, drawn = programs.generate(params, now, last, budget, settings, steps=1)
                last = np.asarray(drawn.tokens[0])
                found.append(int(last[0]))
            return found

        return run

    def texts(self, slots: int, count: int, prompt: int, tokens: int, drafted: int) -> Callable[[], list[int]]:
        """Greedy texts of an engine, each after the middle of a file of Python's library; all their tokens."""
        import sysconfig
        from pathlib import Path

        from tessera.serving.engine import Engine, generate_all
        from tessera.serving.requests import Sampling

        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"), key=lambda file: file.name)
        texts = [file.read_text(encoding="utf-8") for file in files]
        long = [text for text in texts if len(text) > 12 * prompt]
        prompts = []
        for i in range(count):  # from several places of a file where there are more prompts than files
            text = long[i % len(long)]
            place = len(text) * (1 + i // len(long)) // (2 + count // len(long))
            prompts.append(self.tokenizer.encode(text[place : place + 8 * prompt]).tolist()[:prompt])
        programs, params = self.programs(slots)

        def run() -> list[int]:
            engine = Engine(programs, params, lookup=3 if drafted else 0, drafted=max(drafted, 1))
            found = generate_all(engine, prompts, [Sampling(temperature=0.0, max_tokens=tokens)] * count)
            return [token for one in found for token in one.tokens]

        return run


class Transformers:
    """transformers with PyTorch, float32, its own cache, a call a token."""

    def __init__(self, model: str, bits: int):
        import torch
        import transformers

        self.torch = torch
        self.model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def prefill(self, count: int) -> Callable[[], list[int]]:
        """See `Tessera`."""
        ids = self.torch.tensor([tokens_of(count)])

        def run() -> list[int]:
            with self.torch.inference_mode():
                return self.model(ids, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1).tolist()

        return run

    def decode(self, slots: int, count: int) -> Callable[[], list[int]]:
        """See `Tessera`."""
        ids = self.torch.tensor([tokens_of(PROMPT)] * slots)
        with self.torch.inference_mode():
            read = self.model(ids, use_cache=True, logits_to_keep=1)
        first, cache = read.logits[:, -1:].argmax(-1), read.past_key_values

        def run() -> list[int]:
            last, found = first, [int(first[0, 0])]
            with self.torch.inference_mode():
                for _ in range(count):
                    logits = self.model(last, past_key_values=cache, use_cache=True).logits
                    last = logits[:, -1:].argmax(-1)
                    found.append(int(last[0, 0]))
            return found

        return run


class LlamaCpp:
    """llama.cpp by llama-cpp-python's functions of its C interface, one sequence a slot, a call a token."""

    def __init__(self, model: str, bits: int):
        import os

        import llama_cpp

        self.lib = lib = llama_cpp
        silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
        self.silent = silent
        lib.llama_log_set(silent, None)
        lib.llama_backend_init()
        self.model = lib.llama_model_load_from_file(model.encode(), lib.llama_model_default_params())
        options = lib.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch, options.n_seq_max = LENGTH * 8, 512, 512, 8
        options.n_threads = options.n_threads_batch = len(os.sched_getaffinity(0))
        self.context = lib.llama_init_from_model(self.model, options)
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.batch = lib.llama_batch_init(512, 0, 1)

    def feed(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Read (token, position, sequence, whether its logits are wanted) and return the best next tokens."""
        import numpy as np

        self.batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            self.batch.token[i], self.batch.pos[i], self.batch.logits[i] = token, position, wanted
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, sequence
        if self.lib.llama_decode(self.context, self.batch):
            raise RuntimeError("llama_decode failed")
        found = []
        for i, row in enumerate(rows):
            if row[3]:
                logits = np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, i), (self.vocabulary,))
                found.append(int(logits.argmax()))
        return found

    def forget(self) -> None:
        """Empty all sequences."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def prefill(self, count: int) -> Callable[[], list[int]]:
        """See `Tessera`."""
        self.forget()

        def run() -> list[int]:
            return self.feed([(token, i, 0, i == count - 1) for i, token in enumerate(tokens_of(count))])

        return run

    def decode(self, slots: int, count: int) -> Callable[[], list[int]]:
        """See `Tessera`."""
        self.forget()
        first = []
        for slot in range(slots):
            first += self.feed([(token, i, slot, i == PROMPT - 1) for i, token in enumerate(tokens_of(PROMPT))])

        def run() -> list[int]:
            last, found = first, [first[0]]
            for step in range(count):
                last = self.feed([(token, PROMPT + step, slot, True) for slot, token in enumerate(last)])
                found.append(last[0])
            return found

        return run


def main() -> None:
    """Answer the lines of the standard input."""
    name, model, bits = sys.argv[1:4]
    engine = {"tessera": Tessera, "transformers": Transformers, "llama_cpp": LlamaCpp}[name](model, int(bits))
    print("ready", flush=True)
    warm: set[str] = set()
    for line in sys.stdin:
        kind, *sizes = line.split()
        for _ in range(1 if line in warm else 2):  # the first time compiles
            run = getattr(engine, kind)(*map(int, sizes))
            if line not in warm:
                warm.add(line)
                run()
        clock, process = time.perf_counter(), time.process_time()
        found = run()
        clock, process = time.perf_counter() - clock, time.process_time() - process
        print(json.dumps({"seconds": clock, "processor": process, "tokens": found}), flush=True)


if __name__ == "__main__":
    main()
