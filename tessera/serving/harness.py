"""lm-evaluation-harness on a model of ours, in process: `lm_eval.simple_evaluate(model=harness_model(...), tasks=...)`.

Needs the package `lm-eval` (extra `baselines`). Through the server its own `local-completions` does, see
docs/inference.md.
"""

from typing import Any

from tessera.data.text import BPETokenizer
from tessera.serving.chat import ChatFormat
from tessera.serving.engine import Engine, generate_all
from tessera.serving.load import Loaded
from tessera.serving.requests import Sampling
from tessera.serving.scoring import Part, score, windows
from tessera.serving.text import TextStream


def harness_model(engine: Engine, loaded: Loaded, max_tokens: int = 256) -> Any:
    """Make an `lm_eval.api.model.LM` of an engine and what it serves, both from `make_engine`.

    Args:
      engine: that nobody else steps.
      loaded: tokenizer, special tokens and chat template.
      max_tokens: tokens drawn where a task does not say.
    """
    from lm_eval.api.model import TemplateLM

    tokenizer, text = loaded.tokenizer, loaded.format
    begin = loaded.begin
    most = engine.programs.config.length - 1
    chat = ChatFormat(tokenizer, text)

    class Harness(TemplateLM):
        """The harness's questions, put to the engine."""

        eot_token_id = next(iter(text.ends), begin)
        prefix_token_id = begin
        tokenizer_name = "tessera"

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **more: Any) -> list[int]:
            if not isinstance(tokenizer, BPETokenizer):
                return tokenizer.encode(string).tolist()
            if add_special_tokens is None:  # a chat template has written the beginning itself
                add_special_tokens = not string.startswith(tokenizer.name_of(begin))
            return tokenizer.encode(string, special=add_special_tokens).tolist()

        def _loglikelihood_tokens(self, requests: list, **more: Any) -> list[tuple[float, bool]]:
            parts = [Part(tuple(context), tuple(tokens)) for _, context, tokens in requests]
            return [(sum(one.logprobs), one.greedy) for one in score(engine, parts)]

        def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
            found = []
            for request in requests:
                parts = windows(self.tok_encode(request.args[0]), begin, most)
                found.append(sum(sum(one.logprobs) for one in score(engine, parts)))
            return found

        def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
            made = []
            for request in requests:
                prompt, options = request.args
                until = options.get("until") or []
                draw = min(int(options.get("max_gen_toks", max_tokens)), most - 1)
                warm = float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0
                tokens = self.tok_encode(prompt)[-(most - draw) :]
                stream = TextStream(tokenizer, [until] if isinstance(until, str) else until, tokens)
                made.append((tokens, Sampling(temperature=warm, max_tokens=draw), stream))
            return _generate(engine, made)

        def apply_chat_template(self, chat_history: list, add_generation_prompt: bool = True) -> str:
            return chat.render(chat_history, goes_on=not add_generation_prompt)

    return Harness()


def _generate(engine: Engine, asked: list[tuple[list[int], Sampling, TextStream]]) -> list[str]:
    texts = [""] * len(asked)

    def listener(index: int, stream: TextStream) -> Any:
        given = 0

        def notify(request: Any) -> None:
            nonlocal given
            tokens, logprobs, _, finish = request.since(given)
            given += len(tokens)
            texts[index] += stream.feed(tokens, logprobs, final=bool(finish)).text
            if stream.stopped:
                engine.cancel(request)

        return notify

    listeners = [listener(index, stream) for index, (_, _, stream) in enumerate(asked)]
    requests = generate_all(engine, [one[0] for one in asked], [one[1] for one in asked], listeners)
    if any(one.finish == "error" for one in requests):
        raise RuntimeError("the engine failed; the log says why")
    return texts
