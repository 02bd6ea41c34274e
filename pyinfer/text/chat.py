"""Chat: messages to the text, or the token ids, that a model expects.

The template of the file runs in jinja2's sandbox under a Budget. Texts of control tokens inside messages
stay text: a private mark goes into them before rendering, and the tokenizer drops it after it has found the
control tokens, so only those that the template wrote become tokens.

Source: the chat templates of Hugging Face transformers, whose environment (globals, filters, blocks) this is.
"""

from __future__ import annotations

import datetime
import functools
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pyinfer import names
from pyinfer.errors import FormatError, InputError, MissingExtraError, UnsupportedError
from pyinfer.text.budget import MAX_SOURCE_CHARS, Budget, LimitError, Selected, plain
from pyinfer.text.lookalikes import Marker, unused_char
from pyinfer.text.tokenizer import Tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' "
    "}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_NODES = frozenset(
    str.split(
        "Add And Assign AssignBlock Break Call CallBlock Compare Concat CondExpr Const Continue Dict "
        "Div ExprStmt Filter FilterBlock FloorDiv For Getattr Getitem If Keyword List Macro Mod Mul "
        "NSRef Name Neg Not Operand Or Output Pair Pos Pow Scope Slice Sub Template TemplateData Test "
        "Tuple With"
    )
)
# Filters of jinja2 whose result is in proportion to their input.
_FILTERS = str.split(
    "abs capitalize count d default dictsort e escape first float int items last length list lower "
    "map max min reject rejectattr reverse safe select selectattr sort string title trim unique upper "
    "wordcount"
)


class ChatTemplate:
    """A chat template, compiled once; safe to use from several threads.

    source: the jinja2 template, None for chatml. bos, eos: texts of the begin and end tokens, for the
    template. Raises FormatError if the source is no template, UnsupportedError if it uses what pyinfer does
    not allow, MissingExtraError without jinja2.
    """

    def __init__(self, source: str | None, bos: str = "", eos: str = ""):
        source = CHATML if source is None else source
        if len(source) > MAX_SOURCE_CHARS:
            raise UnsupportedError(
                f"{names.CHAT_TEMPLATE} has {len(source)} characters; pyinfer takes up to {MAX_SOURCE_CHARS}"
            )
        self._tokens = {"bos_token": bos, "eos_token": eos}
        self._lock = threading.Lock()
        self._environment = _sandbox_class()()
        self._template = self._guarded(lambda: self._environment.template(source))

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **extra: Any
    ) -> str:
        """The prompt for these messages ({"role": ..., "content": ...} each).

        extra: further variables for the template, such as tools=[...]. Raises InputError if messages are
        not plain data or the template refuses them, UnsupportedError if it takes too long or too much
        memory.
        """
        try:
            variables = plain({"tools": None, "documents": None, "messages": list(messages), **extra})
        except ValueError as error:
            raise InputError(
                f"chat messages contain {error}; expected text, numbers, lists and dicts"
            ) from None
        variables |= {"add_generation_prompt": add_generation_prompt, **self._tokens}

        def run() -> str:
            budget = self._environment.budget
            parts, chars = [], 0
            for part in self._template.generate(variables):
                chars += len(part)
                budget.check_length(chars)
                budget.spend(len(part))
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
                raise UnsupportedError(
                    f"{where} cannot be used: {error}; use no chat or another file"
                ) from None
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

    Texts of control tokens in messages stay text. Without a template, chatml is used if the vocabulary has
    its tokens; UnsupportedError otherwise.
    """
    source = tokenizer.chat_template
    if source is None and not {"<|im_start|>", "<|im_end|>"} <= tokenizer.control_texts:
        raise UnsupportedError(
            f"{names.CHAT_TEMPLATE} is missing, so the model cannot chat; complete a plain prompt instead"
        )
    template = _compiled(
        source, tokenizer.token_text(tokenizer.bos_id), tokenizer.token_text(tokenizer.eos_id)
    )
    texts = [source or CHATML, *tokenizer.control_texts]
    checked = _checked_all(messages)
    try:
        data = plain({"messages": checked, **extra})
        plain(data, lambda text: texts.append(text) or text)
    except ValueError as error:
        raise InputError(f"chat messages contain {error}; expected text, numbers, lists and dicts") from None
    mark = unused_char(texts)
    data = plain(data, Marker(tokenizer.control_texts, mark))
    text = template.render(data.pop("messages"), add_generation_prompt, **data)
    ids = tokenizer.encode(text, bos=False, special=True, mark=mark)
    if tokenizer.add_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        ids.insert(0, tokenizer.bos_id)
    return ids


_compiled = functools.lru_cache(maxsize=8)(ChatTemplate)


def _checked_all(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        raise InputError(
            f"chat messages are a {type(messages).__name__}; "
            "expected a list of dicts with a role and a content"
        )
    return [_checked(message) for message in messages]


def _checked(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message; a content of text parts only is their text, because few templates know parts."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InputError(
            f"a chat message is {str(message)[:80]!r}; expected a dict with a role and a content"
        )
    parts = message.get("content")
    if isinstance(parts, list) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in parts):
        return {**message, "content": "".join(str(part.get("text", "")) for part in parts)}
    return message


class _RefusedError(Exception):
    """raise_exception() of a template."""


def _refuse(message: object = "") -> None:
    raise _RefusedError(str(message)[:500])


def _now(layout: str) -> str:
    if len(layout) > 100 or re.search(r"%[^a-zA-Z%]*\d", layout):
        raise LimitError("it formats the date with a width")
    return datetime.datetime.now().strftime(layout)


class _Format:
    """str.format of one text, without wide columns."""

    def __init__(self, text: str, work: Any, budget: Budget):
        self._text, self._work, self._budget = text, work, budget

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        self._budget.check_format(self._text, (*args, *kwargs.values()))
        return self._work(*args, **kwargs)


class _Accounts:
    """What is different from jinja2's sandbox: everything that repeats or grows goes through the budget."""

    budget: Budget
    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self, extensions: Sequence[Any]):
        import jinja2

        def finalize(_: Any, value: Any) -> str:
            return self.budget.text(value)

        self.budget = Budget()
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            cache_size=0,
            finalize=jinja2.pass_context(finalize),  # with a context, jinja2 computes nothing while compiling
            extensions=extensions,
        )
        known: dict[str, Any] = self.filters
        self._indent = known["indent"]
        self.filters = {name: self._filter(known[name]) for name in _FILTERS} | self._own_filters()
        self.tests = {name: self._test(test) for name, test in self.tests.items()}
        self.globals = {
            "range": lambda *numbers: self.budget.numbers(*numbers),
            "dict": dict,
            "namespace": type("Namespace", (jinja2.utils.Namespace,), {"__repr__": lambda _: "<Namespace>"}),
            "raise_exception": _refuse,
            "strftime_now": _now,
        }
        self._functions = tuple(self.globals.values())

    def template(self, source: str) -> Any:
        """The compiled template."""
        return self.from_string(_accounted(self.parse(source)))

    def concat(self, parts: Iterable[str]) -> str:
        return self.budget.join(parts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        return self.budget.operate(operator, left, right, self.binop_table[operator])

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        from jinja2 import Undefined
        from jinja2.runtime import LoopContext, Macro

        owner = getattr(__obj, "__self__", None)
        named = {name: value for name, value in kwargs.items() if name not in ("_loop_vars", "_block_vars")}
        if isinstance(owner, (str, bytes, int, float, list, tuple, dict)):
            if named:
                raise LimitError(f"it calls {__obj.__name__} with keywords")
            return __self.budget.call_method(__obj, args)
        if isinstance(__obj, LoopContext):
            args = (__self.budget.each(args[0]), *args[1:])
        elif not (
            isinstance(__obj, (Macro, Undefined, _Format))
            or isinstance(owner, LoopContext)
            or any(__obj is function for function in __self._functions)
        ):
            raise LimitError(f"it calls a {type(__obj).__name__}, which templates may not call here")
        __self.budget.weigh(args)
        __self.budget.weigh(named)
        return __self.budget.made(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Any:
        work = super().wrap_str_format(value)
        return None if work is None else _Format(value.__self__, work, self.budget)

    def _own_filters(self) -> dict[str, Any]:
        """Filters that check before they work, and those that _accounted puts into the template."""

        def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
            return self.budget.to_json(value, indent, ensure_ascii=ensure_ascii, **options)

        def join(values: Iterable[Any], between: str = "", attribute: str | int | None = None) -> str:
            found = values if attribute is None else [self.getitem(value, attribute) for value in values]
            return self.budget.join(self.budget.each(found), between)

        def indent(text: str, width: int | str = 4, *args: Any, **kwargs: Any) -> str:
            if (width if isinstance(width, int) else len(width)) > 64:
                raise LimitError("it indents by more than 64 characters")
            self.budget.spend(len(text) + 64 * (text.count("\n") + 1))
            return self.budget.made(self._indent(text, width, *args, **kwargs))

        def percent(template: str, *values: Any, **named: Any) -> str:
            self.budget.check_format(template, (*values, *named.values()))
            return self.budget.made(template % (named or values))

        return {
            "tojson": to_json,
            "join": join,
            "indent": indent,
            "format": percent,
            "replace": lambda text, old, new, count=-1: self.budget.replace(
                self.budget.text(text), old, new, count
            ),
            "string": lambda value: self.budget.text(value),
            "budget each": lambda values: self.budget.each(values),
            "budget step": lambda value: self.budget.step(value),
            "budget made": lambda value: self.budget.made(value),
            "budget join": lambda values: self.budget.join(values),
        }

    def _filter(self, work: Any) -> Any:
        @functools.wraps(work)
        def filtered(*args: Any, **kwargs: Any) -> Any:
            result = work(*args, **kwargs)
            return self.budget.made(
                Selected(self.budget.each(result)) if isinstance(result, Iterator) else result
            )

        return filtered

    def _test(self, work: Any) -> Any:
        @functools.wraps(work)
        def tested(*args: Any, **kwargs: Any) -> Any:
            return self.budget.step(work(*args, **kwargs))

        return tested


def _accounted(node: Any) -> Any:
    """The tree, with what a sandbox cannot intercept (loops, literals, `~`, slices) made to pay."""
    from jinja2 import nodes

    def paid(inner: Any, way: str) -> Any:
        return nodes.Filter(inner, f"budget {way}", [], [], None, None, lineno=node.lineno)

    kind = type(node).__name__
    if kind not in _NODES:
        raise LimitError(f"line {node.lineno} has a {kind}, which templates may not have here")
    for field, value in node.iter_fields():
        if isinstance(value, nodes.Node):
            setattr(node, field, _accounted(value))
        elif isinstance(value, list):
            setattr(node, field, [_accounted(v) if isinstance(v, nodes.Node) else v for v in value])
    if kind == "For":
        node.iter = paid(node.iter, "each")
    elif kind == "Concat":
        return paid(nodes.List(node.nodes, lineno=node.lineno), "join")
    elif kind == "Compare":
        return paid(node, "step")
    elif (
        kind in ("List", "Dict")
        or (kind == "Tuple" and node.ctx == "load")
        or (kind == "Getitem" and isinstance(node.arg, nodes.Slice))
    ):
        return paid(node, "made")
    return node


@functools.lru_cache(maxsize=1)
def _sandbox_class() -> Any:
    """The sandbox, made at first use because jinja2 takes 20 ms to import."""
    try:
        from jinja2 import nodes
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise MissingExtraError("chat templates need jinja2; run: pip install jinja2") from None

    class Generation(Extension):
        """{% generation %} marks the assistant's words for training; here only its content counts."""

        tags = {"generation"}  # noqa: RUF012 (jinja2's interface)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(
                parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line
            )

    class Sandbox(_Accounts, ImmutableSandboxedEnvironment):
        def __init__(self) -> None:
            super().__init__(["jinja2.ext.loopcontrols", Generation])

    return Sandbox
