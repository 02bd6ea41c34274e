"""`pyinfer-generate`: a model answers a prompt, or talks on a terminal.

Text goes to standard output and nothing else does; progress, figures and errors go to standard error. Exit
codes: 0 done, 1 something is wrong with the input (one sentence), 2 wrong usage, 130 interrupted. Heavy
imports wait until they are needed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pyinfer import PyInferError, __version__
from pyinfer.cli_stats import loss_line, stats_lines, stats_object
from pyinfer.errors import InputError
from pyinfer.interrupts import interruptible, remembered_interrupts
from pyinfer.progress import Progress

if TYPE_CHECKING:
    from pyinfer.llama import Llama
    from pyinfer.runtime.generate import GenerationStats, Segment, TextOptions
    from pyinfer.runtime.sampler import SamplingParams

# the processor time used so far is, in a process this young, the time since its start
STARTED = time.perf_counter() - time.process_time()
INTERRUPTED = 130
SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repeat_penalty",
    "frequency_penalty",
    "presence_penalty",
)

CHAT_MODEL = "smollm2-135m"  # for those who want to chat

# What the library calls by another name than the command line does.
OPTION_NAMES = {"n_ctx": "--ctx", "n_threads": "--threads", "max_tokens": "--max-tokens", "stop": "--stop"}
OPTION_NAMES |= {"temperature": "--temp", "seed": "--seed", "sparsity": "--sparsity"}
OPTION_NAMES |= {name: f"--{name.replace('_', '-')}" for name in SAMPLING[1:]}
# As the subject of a sentence, and where no other word is meant also inside of one; never in a path.
_LIBRARY_NAME = re.compile(
    rf"^({'|'.join(OPTION_NAMES)})(?= is )|(?<![\w./\\-])(n_ctx|n_threads|max_tokens)(?![\w/\\-]|\.\w)"
)

Opener = Callable[[dict[str, Any]], "Llama"]


def _note(text: str) -> None:
    click.echo(text, err=True)


def _read_stdin() -> str:
    data = sys.stdin.buffer.read()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not UTF-8 at byte {error.start}") from None
    return text.replace("\r\n", "\n").removesuffix("\n")


def _prompt(options: dict[str, Any]) -> str | None:
    """The prompt from the command line or standard input; None when a person sits there to be asked."""
    if options["text"] is not None and options["prompt"] is not None:
        raise click.UsageError("the prompt was given twice, as argument and with -p")
    prompt = options["text"] if options["text"] is not None else options["prompt"]
    if prompt is None and sys.stdin is not None and sys.stdin.isatty():
        if options["as_json"] or options["chat"] is False:
            raise click.UsageError("--json and --no-chat need a prompt")
        return None
    if prompt is None or prompt == "-":
        prompt = _read_stdin() if sys.stdin is not None else ""
    if not prompt:
        raise InputError("the prompt is empty; give one as argument, with -p, or through standard input")
    return prompt


def _open_llama(options: dict[str, Any]) -> Llama:
    """Find, if need be fetch, and load the model."""
    from pyinfer.model_store import DEFAULT_MODEL, find_model

    name = options["model"] or DEFAULT_MODEL
    with Progress(sys.stderr, f"fetching {name}") as progress:
        path = find_model(name, progress=progress, offline=options["offline"])
    from pyinfer.jit.kernel_cache import cache_folder, kernel_cache_is_cold
    from pyinfer.llama import Llama

    if kernel_cache_is_cold():
        _note(_compile_notice(cache_folder()))
    with Progress(sys.stderr, "loading") as progress:
        return Llama(
            path,
            n_ctx=options["ctx"],
            n_threads=options["threads"],
            sparsity=options["sparsity"],
            observe="stats" if options["stats"] else None,
            progress=progress,
        )


def _compile_notice(folder: Path) -> str:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return "compiling kernels for this processor, once (some seconds)"
    except OSError:
        return (
            f"{folder} cannot be written, so kernels are compiled at every start (some seconds); "
            "PYINFER_CACHE_DIR names another folder"
        )


def _summary(stats: GenerationStats) -> str:
    parts = [f"{stats.prompt_tokens} prompt tokens"]
    if stats.reused_tokens:
        parts[-1] += f" ({stats.reused_tokens} known)"
    parts[-1] += f" at {stats.prefill_tokens_per_second:.0f} t/s"
    parts.append(f"{stats.completion_tokens} tokens at {stats.decode_tokens_per_second:.0f} t/s")
    if stats.completion_tokens:
        parts.append(f"first token after {stats.first_token_seconds:.2f} s")
    return ", ".join(parts)


def _show(segments: Iterator[Segment]) -> Segment:
    """Write an answer as it comes, ending its last line; the last segment."""
    end, segment = "\n", None
    for segment in segments:
        if segment.text:
            end = "" if segment.text.endswith("\n") else "\n"
            sys.stdout.write(segment.text)
            sys.stdout.flush()
    sys.stdout.write(end)
    sys.stdout.flush()
    assert segment is not None, "a stream ends with a segment that has a finish_reason"
    return segment


def _show_json(segments: Iterator[Segment], llm: Llama, load_seconds: float, with_stats: bool) -> Segment:
    """Write one JSON object about a whole answer; the last segment."""
    parts = list(segments)
    last = parts[-1]
    stats = last.stats
    answer = {
        "model": str(llm.model_path),
        "text": "".join(part.text for part in parts),
        "tokens": [int(token) for part in parts for token in part.tokens],
        "finish_reason": last.finish_reason,
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.completion_tokens,
        "timings": {
            "load_seconds": load_seconds,
            "first_token_seconds": stats.first_token_seconds,
            "prefill_seconds": stats.prefill_seconds,
            "decode_seconds": stats.decode_seconds,
            "prefill_tokens_per_second": stats.prefill_tokens_per_second,
            "decode_tokens_per_second": stats.decode_tokens_per_second,
        },
    }
    if with_stats:
        answer["sparsity"] = stats_object(llm)
    click.echo(json.dumps(answer, ensure_ascii=False))
    return last


def _prompt_tokens(llm: Llama, prompt: str, options: dict[str, Any]) -> list[int]:
    chat = options["chat"] if options["chat"] is not None else llm.tokenizer.chat_template is not None
    if chat:
        from pyinfer.text.chat import encode_chat

        system = [{"role": "system", "content": options["system"]}] if options["system"] is not None else []
        return encode_chat(llm.tokenizer, [*system, {"role": "user", "content": prompt}])
    if options["system"] is not None:
        raise InputError("--system needs a chat, but this model has no chat template or --no-chat was given")
    return llm.tokenize(prompt)


def _answer_prompt(
    llm: Llama, prompt: str, options: dict[str, Any], text_options: TextOptions, sampling: SamplingParams
) -> int:
    load_seconds = time.perf_counter() - STARTED
    tokens = _prompt_tokens(llm, prompt, options)
    if options["verbose"]:
        threads = getattr(llm.session, "n_threads", "?")
        _note(
            f"{llm.model_path}: ready after {load_seconds:.2f} s, "
            f"{llm.n_ctx()} tokens of context, {threads} threads"
        )
    began = threading.Event()
    with Progress(sys.stderr, "reading the prompt", "tokens") as progress, interruptible(llm, began.is_set):

        def segments() -> Iterator[Segment]:
            for segment in llm.stream_segments(
                tokens, text_options, sampling, progress=progress, began=STARTED
            ):
                began.set()
                progress.close()  # before the first text, or the two would share a line
                yield segment

        if options["as_json"]:
            last = _show_json(segments(), llm, load_seconds, options["stats"])
        else:
            last = _show(segments())
    _note(_summary(last.stats) + (f", ended by {last.finish_reason}" if options["verbose"] else ""))
    if options["stats"] and not options["as_json"]:
        _note("\n".join(stats_lines(llm)))
    return INTERRUPTED if last.finish_reason == "cancelled" else 0


def _read_line() -> str:
    """A line of the person at the terminal; EOFError at the end."""
    if sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  line editing and history for input()
        return input("> ")
    click.echo("> ", nl=False, err=True)  # input() would write its sign into the redirected output
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def _talk(llm: Llama, options: dict[str, Any], text_options: TextOptions, sampling: SamplingParams) -> int:
    from pyinfer.conversation import Conversation, run_conversation

    if llm.tokenizer.chat_template is None and not options["chat"]:
        raise InputError(
            f"{Path(llm.model_path).name} has no chat template, it continues texts: give the beginning "
            f"of one as prompt, or -m {CHAT_MODEL} to chat (--chat chats with any model, in ChatML)"
        )

    def write(segments: Iterator[Segment]) -> Segment:
        if options["stats"]:
            llm.session.reset_observed()  # a table for each answer
        with interruptible(llm):
            last = _show(segments)
        if options["verbose"]:
            _note(_summary(last.stats))
        if options["stats"]:
            _note("\n".join(stats_lines(llm)))
        return last

    conversation = Conversation(llm, options["system"], text_options, sampling)
    run_conversation(conversation, _read_line, write, sys.stderr)
    return 0


def _skipped_share(sparsity: str) -> float | None:
    """The share of cats=SHARE, None for the other modes."""
    from pyinfer.neurons.sparsity import CATS, parse_sparsity

    try:
        mode, share = parse_sparsity(sparsity)
    except InputError as error:
        raise click.UsageError(_in_options(str(error))) from None
    return share if mode == CATS else None


def _run(options: dict[str, Any], open_llama: Opener, check: Callable[[], None]) -> int:
    skipped = _skipped_share(options["sparsity"])
    prompt = _prompt(options)
    from pyinfer.model_store import DEFAULT_MODEL, advised_temperature
    from pyinfer.runtime.generate import TextOptions
    from pyinfer.runtime.sampler import SamplingParams

    limit = options["max_tokens"] if options["max_tokens"] >= 0 else None
    text_options = TextOptions(limit, options["stop"])
    chosen = {name: options[name] for name in SAMPLING}
    if chosen["temperature"] is None:
        chosen["temperature"] = advised_temperature(options["model"] or DEFAULT_MODEL)
    sampling = SamplingParams(seed=options["seed"], **chosen)
    with open_llama(options) as llm:
        check()
        for notice in llm.notices:
            _note(f"note: {notice}")
        if skipped is not None:
            _note(loss_line(llm, options["sparsity"], skipped))
        if prompt is None:
            return _talk(llm, options, text_options, sampling)
        return _answer_prompt(llm, prompt, options, text_options, sampling)


def _in_options(sentence: str) -> str:
    """A sentence of the library, in the words of this command."""
    return _LIBRARY_NAME.sub(lambda match: OPTION_NAMES[match.group()], sentence)


def _drop_output() -> None:
    """What could not be written to stdout must not fail once more when the interpreter ends."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a stand-in has no file behind it
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _exit_code(options: dict[str, Any], open_llama: Opener) -> int:
    """Run and turn everything that can go wrong outside of this program into a sentence and an exit code."""
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack characters that the model writes
    try:
        with remembered_interrupts() as check:
            return _run(options, open_llama, check)
    except BrokenPipeError:  # nobody reads on, which is no fault
        _drop_output()
        return 0
    except KeyboardInterrupt:
        _note("\ninterrupted")
        return INTERRUPTED
    except (PyInferError, OSError, MemoryError) as error:
        if isinstance(error, OSError):
            _drop_output()
        if options["verbose"]:
            traceback.print_exc()
        _note(f"error: {_in_options(str(error)) or type(error).__name__}")
        return 1


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("text", metavar="[PROMPT]", required=False)
@click.option(
    "-m", "--model", help="GGUF file or name of a model, fetched once.  [default: a story teller of our own]"
)
@click.option("-p", "--prompt", help="The prompt; - reads it from standard input, like a pipe without -p.")
@click.option("--system", help="System message of the chat.")
@click.option(
    "-n", "--max-tokens", type=click.IntRange(-1), default=512, show_default=True, help="-1: as many as fit."
)
@click.option(
    "--temp", "--temperature", "temperature", type=float, help="0: greedy.  [default: 0.8, SmolLM2 0.2]"
)
@click.option("--top-k", type=int, default=40, show_default=True, help="Only the K likeliest tokens; 0: all.")
@click.option(
    "--top-p", type=float, default=0.95, show_default=True, help="Likeliest tokens of this mass; 1: all."
)
@click.option(
    "--min-p", type=float, default=0.05, show_default=True, help="Least share of the likeliest's chance."
)
@click.option("--repeat-penalty", type=float, default=1.0, show_default=True, help="Above 1: repeat less.")
@click.option("--frequency-penalty", type=float, default=0.0, show_default=True, help="Per occurrence.")
@click.option("--presence-penalty", type=float, default=0.0, show_default=True, help="Once per token seen.")
@click.option("--seed", type=int, help="Makes the answer repeatable.  [default: random]")
@click.option(
    "--stop", multiple=True, metavar="TEXT", help="Ends the answer and is not shown; may be repeated."
)
@click.option(
    "-t", "--threads", type=click.IntRange(1), help="Threads that compute.  [default: as many as may be used]"
)
@click.option(
    "-c", "--ctx", type=click.IntRange(1), help="Tokens of context.  [default: the model's, at most 4096]"
)
@click.option(
    "--chat/--no-chat", default=None, help="Chat or plain continuation.  [default: as the model is made]"
)
@click.option(
    "--sparsity",
    default="auto",
    show_default=True,
    metavar="MODE",
    help="Which neurons are computed: auto, exact, predicted, cats=SHARE (0.5 skips half), dense.",
)
@click.option(
    "--stats",
    is_flag=True,
    help="Show per layer what fired and was skipped; with predictors this costs all gates once more.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with text, tokens and timings.")
@click.option("--offline", is_flag=True, help="Never use the network.")
@click.option("-v", "--verbose", is_flag=True, help="More figures, and tracebacks with errors.")
@click.version_option(__version__, prog_name="pyinfer-generate")
@click.pass_context
def main(context: click.Context, **options: Any) -> None:
    """Continue PROMPT with a language model, or answer it where the model is made for chats.

    Without a prompt such a model chats. The default tells stories, -m smollm2-135m chats.

    Example: pyinfer-generate "Once upon a time"
    """
    context.exit(_exit_code(options, context.obj or _open_llama))
