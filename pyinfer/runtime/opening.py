"""A model together with a session over it: opened for class Llama, and released again."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from pyinfer.errors import InputError
from pyinfer.runtime.arguments import shown
from pyinfer.runtime.generate import Progress

CONTEXT_TOKENS = 4096  # default context, where the model has that much


def open_session(
    path: str | Path,
    n_ctx: int | None,
    n_threads: int | None,
    progress: Progress | None = None,
    sparsity: str = "auto",
    observe: str | None = None,
) -> tuple[Any, Any]:
    """A Model and a Session; everything is released again when one of them cannot be made.

    n_ctx : None: the model's, at most 4096;  others : as `load_model` and `Session` take them
    Raises what those raise, and InputError for a context longer than the model was made for.
    """
    if not isinstance(sparsity, str):
        raise InputError(f"sparsity is {shown(sparsity)}, expected a text such as 'auto' or 'cats=0.5'")
    from pyinfer.runtime.loader import load_model  # numba comes with it, which takes most of the start-up
    from pyinfer.runtime.session import Session

    model = load_model(path, progress=progress, sparsity=sparsity, observe=observe)
    try:
        trained = int(model.hparams.context_length)
        if n_ctx is not None and n_ctx > trained:
            raise InputError(f"n_ctx is {n_ctx}, {path} was made for at most {trained}")
        _ = model.tokenizer  # made at first use; a bad one is found before threads are started
        return model, Session(model, min(trained, CONTEXT_TOKENS) if n_ctx is None else int(n_ctx), n_threads)
    except BaseException:
        model.close()
        raise


def release(session: Any, model: Any) -> None:
    """End the threads and unmap the file."""
    # the garbage collector may come in one of the threads that end: they were all told to, only their join
    # is missing then
    with contextlib.suppress(RuntimeError):
        session.close()
    model.close()
