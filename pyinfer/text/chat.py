"""Chat: messages to the text, or the token ids, that a model expects.

The template of the file runs in jinja2's sandbox under a Budget. Texts of control tokens inside messages stay text:
a private mark goes into them before rendering, and the tokenizer drops it after it has found the control tokens, so
only those that the template wrote become tokens.

Source: the chat templates of Hugging Face transformers, whose environment (globals, filters, blocks) this is.
"""

from __future__ import annotations

import datetime
import functools
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pyinfer import names
from pyinfer.errors import FormatError, InputError, MissingExtraError, UnsupportedError
from pyinfer.text.budget import MAX_SOURCE_CHARS, Budget, LimitError, plain
from pyinfer.text.tokenizer import Tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_NODES = frozenset(
    "Add And Assign AssignBlock Break CallBlock Compare Concat CondExpr Const Continue Dict Div ExprStmt Filter "
    "FilterBlock FloorDiv For Getattr Getitem If Keyword List Macro Mod Mul NSRef Name Neg Not Operand Or Output "
    "Pair Pos Pow Scope Slice Sub Template TemplateData Test Tuple With".split()
)
# Filters of jinja2 whose result is in proportion to their input.
_FILTERS = (
    "abs capitalize count d default dictsort e escape first float int items last length list lower map max min "
    "reject rejectattr reverse safe select selectattr sort string title trim unique upper wordcount".split()
)


class ChatTemplate:
    """A chat template, compiled once; safe to use from several threads.

    source: the jinja2 template, None for chatml. bos, eos: texts of the begin and end tokens, for the template.
    Raises FormatError if the source is no template, UnsupportedError if it uses what pyinfer does not allow,
    MissingExtraError without jinja2.
    """

    def __init__(self, source: str | None, bos: str = "", eos: str = ""):
        source = CHATML if source is None else source
        if len(source) > MAX_SOURCE_CHARS:
            raise UnsupportedError(
                f"{names.CHAT_TEMPLATE} has {len(source)} characters; pyinfer takes up to {MAX_SOURCE_CHARS}"
            )
        self._tokens = {"bos_token": bos, "eos_token": eos}
        self._lock = threading.Lock()
        self._environment = _environment_class()()
        self._template = self._guarded(lambda: self._environment.template(source))

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **extra: Any
    ) -> str:
        """The prompt for these messages ({"role": ..., "content": ...} each).

        extra: further variables for the template, such as tools=[...]. Raises InputError if messages are not plain
        data or the template refuses them, UnsupportedError if it takes too long or too much memory.
        """
        try:
            variables = plain({"messages": list(messages), **extra})
        except ValueError as error:
            raise InputError(f"chat messages contain {error}; expected text, numbers, lists and dicts") from None
        variables |= {"add_generation_prompt": add_generation_prompt, **self._tokens}

        def run() -> str:
            budget = self._environment.budget
            parts, chars = [], 0
            for part in self._template.generate(variables):
                chars += len(part)
                budget.spend(len(part))
                budget.spend(chars)  # also bounds the whole
                parts.append(part)
            return "".join(parts)

        return self._guarded(run)

    def _guarded(self, work: Any) -> Any:
        import jinja2

        where = names.CHAT_TEMPLATE
        with self._lock:
            self._environment.budget = Budget()
            try:
                return work()
            except _RefusedError as error:
                raise InputError(f"the chat template refuses these messages: {error}") from None
            except (LimitError, jinja2.sandbox.SecurityError, jinja2.TemplateAssertionError) as error:
                raise UnsupportedError(f"{where} cannot be used: {error}; use no chat or another file") from None
            except (RecursionError, MemoryError):
                raise UnsupportedError(f"{where} cannot be used: it is nested too deeply") from None
            except jinja2.TemplateSyntaxError as error:
                raise FormatError(f"{where}, line {error.lineno}: {str(error.message)[:200]}") from None
            except Exception as error:  # whatever a template's operations raise
                raise FormatError(f"{where} fails: {type(error).__name__}: {str(error)[:200]}") from None
            finally:
                self._environment.budget = Budget()


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = True,
    **extra: Any,
) -> list[int]:
    """Token ids of the prompt for these messages, by the model's chat template.

    Texts of control tokens in messages stay text. Without a template, chatml is used if the vocabulary has its
    tokens; UnsupportedError otherwise.
    """
    source = tokenizer.chat_template
    if source is None and not {"<|im_start|>", "<|im_end|>"} <= tokenizer.control_texts:
        raise UnsupportedError(
            f"{names.CHAT_TEMPLATE} is missing, so the model cannot chat; complete a plain prompt instead"
        )
    template = _compiled(source, tokenizer.token_text(tokenizer.bos_id), tokenizer.token_text(tokenizer.eos_id))
    mark = _unused_char(source or CHATML, messages, extra)
    marked = _Marker(tokenizer.control_texts, mark)
    try:
        messages = [plain(_flat(message), marked) for message in messages]
        extra = plain(extra, marked)
    except ValueError as error:
        raise InputError(f"chat messages contain {error}; expected text, numbers, lists and dicts") from None
    text = template.render(messages, add_generation_prompt, **extra)
    ids = tokenizer.encode(text, bos=False, special=True, mark=mark)
    if tokenizer.add_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        ids.insert(0, tokenizer.bos_id)
    return ids


_compiled = functools.lru_cache(maxsize=8)(ChatTemplate)


def _flat(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A content of text parts only, as some clients send it, is their text: few templates know parts."""
    parts = message.get("content") if isinstance(message, Mapping) else None
    if isinstance(parts, list) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in parts):
        return {**message, "content": "".join(str(part.get("text", "")) for part in parts)}
    return message


def _unused_char(*values: Any) -> str:
    """A private-use character that occurs in none of the values."""
    seen: set[str] = set()
    for value in values:
        seen.update(re.findall("[\ue000-\uf8ff]", str(value)))
    for code in range(0xE000, 0xF900):
        if chr(code) not in seen:
            return chr(code)
    raise InputError("the messages use every private character of Unicode; leave some out")


class _Marker:
    """Puts the mark into every text of a control token, and where one could begin or end at the text's borders."""

    def __init__(self, controls: frozenset[str], mark: str):
        self._controls, self._starts, self._ends = _borders(controls)
        self._mark = mark

    def __call__(self, text: str) -> str:
        for name in self._controls:
            while name in text:
                text = text.replace(name, name[0] + self._mark + name[1:])
        body = text.rstrip()
        if any(body.endswith(start) for start in self._starts.get(body[-1:], ())):
            text = body + self._mark + text[len(body) :]
        body = text.lstrip()
        if any(body.startswith(end) for end in self._ends.get(body[:1], ())):
            text = text[: len(text) - len(body)] + self._mark + body
        return text


@functools.lru_cache(maxsize=8)
def _borders(controls: frozenset[str]) -> tuple[list[str], dict[str, set[str]], dict[str, set[str]]]:
    """Names longer than a character; their proper beginnings by last character, their ends by first."""
    longer = [name for name in controls if len(name) > 1]
    starts: dict[str, set[str]] = {}
    ends: dict[str, set[str]] = {}
    for name in longer:
        for cut in range(1, min(len(name), 64)):
            starts.setdefault(name[cut - 1], set()).add(name[:cut])
            ends.setdefault(name[cut], set()).add(name[cut:])
    return longer, starts, ends


class _RefusedError(Exception):
    """raise_exception() of a template."""


def _refuse(message: object = "") -> None:
    raise _RefusedError(str(message)[:500])


def _now(layout: str) -> str:
    if len(layout) > 100 or re.search(r"%[^a-zA-Z%]*\d", layout):
        raise LimitError("it formats the date with a width")
    return datetime.datetime.now().strftime(layout)


@functools.lru_cache(maxsize=1)
def _environment_class() -> Any:
    """The sandbox, made at first use because jinja2 is optional and slow to import."""
    try:
        import jinja2
        import jinja2.ext
        import jinja2.sandbox
        from jinja2 import nodes
        from jinja2.visitor import NodeTransformer
    except ImportError:
        raise MissingExtraError("chat templates need jinja2; run: pip install 'pyinfer[chat]'") from None

    class Accounting(NodeTransformer):
        """Routes what the sandbox does not intercept (loops, literals, `~`, slices, comparisons) to the budget."""

        def visit(self, node: Any, *args: Any, **kwargs: Any) -> Any:
            kind = type(node).__name__
            if kind not in _NODES:
                raise LimitError(f"it uses {kind}")
            node = self.generic_visit(node, *args, **kwargs)
            if isinstance(node, nodes.For):
                node.iter = self._paid(node.iter, "each")
            elif isinstance(node, nodes.Concat):
                return self._paid(nodes.List(node.nodes, lineno=node.lineno), "join parts")
            elif isinstance(node, nodes.Compare):
                return self._paid(node, "step")
            elif isinstance(node, (nodes.List, nodes.Dict)) or getattr(node, "ctx", "") == "load" and isinstance(
                node, (nodes.Tuple, nodes.Getitem)
            ):
                return self._paid(node, "made")
            return node

        def _paid(self, node: Any, way: str) -> Any:
            return nodes.Filter(node, f"budget {way}", [], [], None, None, lineno=node.lineno)

    class Generation(jinja2.ext.Extension):
        """{% generation %}: marks the assistant's words for training; here only its content counts."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))
        budget: Budget

        def __init__(self) -> None:
            super().__init__(
                trim_blocks=True,
                lstrip_blocks=True,
                optimized=False,
                cache_size=0,
                finalize=jinja2.pass_context(lambda _, value: self.budget.text(value)),
                extensions=["jinja2.ext.loopcontrols", Generation],
            )
            self.budget = Budget()
            self.filters = {name: self._filter(self.filters[name]) for name in _FILTERS} | self._own_filters()
            self.tests = {name: self._test(test) for name, test in self.tests.items()}
            self._functions = {
                "range": lambda *args: self.budget.numbers(*args),
                "dict": dict,
                "namespace": jinja2.utils.Namespace,
                "raise_exception": _refuse,
                "strftime_now": _now,
            }
            self.globals = dict(self._functions)

        def template(self, source: str) -> Any:
            """The compiled template."""
            return self.from_string(Accounting().visit(self.parse(source)))

        def concat(self, parts: Iterable[str]) -> str:
            return self.budget.join(parts)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            return self.budget.operate(operator, left, right, self.binop_table[operator])

        def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902, N805
            self = __self
            owner = getattr(__obj, "__self__", None)
            if isinstance(owner, (str, bytes, int, float, list, tuple, dict)):
                if kwargs:
                    raise LimitError(f"it calls {__obj.__name__} with keywords")
                return self.budget.call_method(__obj, args)
            if isinstance(__obj, jinja2.runtime.LoopContext):
                args = (self.budget.each(args[0]), *args[1:])
            elif not (
                isinstance(__obj, (jinja2.runtime.Macro, jinja2.Undefined))
                or isinstance(owner, jinja2.runtime.LoopContext)
                or any(__obj is function for function in self._functions.values())
            ):
                raise LimitError(f"it calls a {type(__obj).__name__}, which templates may not call here")
            self.budget.spend()
            return self.budget.made(super().call(__context, __obj, *args, **kwargs))

        def _filter(self, work: Any) -> Any:
            @functools.wraps(work)
            def filtered(*args: Any, **kwargs: Any) -> Any:
                result = self.budget.made(work(*args, **kwargs))
                return self.budget.each(result) if isinstance(result, jinja2.filters.t.Iterator) else result

            return filtered

        def _test(self, work: Any) -> Any:
            return functools.wraps(work)(lambda *args, **kwargs: self.budget.step(work(*args, **kwargs)))

    return Sandbox
