"""Loading from a folder or the hub, and why it failed, in one sentence: field, id, cause and what to do."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import get_session

from savelib.config import ConfigError
from savelib.paths import resolve

T = TypeVar("T")
PATIENCE = 3.0  # seconds for the hub's first answer
LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


def from_pretrained(kind: type[T], source: str, field: str, **settings: Any) -> T:
    """kind.from_pretrained(source): the one place where configs, tokenizers and models are read.

    Code that lies beside a model is never run, nor asked about (stdin may answer yes). Raises ConfigError that names
    the config field.
    """
    try:
        with asked_once(source):
            return kind.from_pretrained(resolve(source), trust_remote_code=False, **settings)
    except Exception as error:  # whatever transformers, the hub client or safetensors raise
        part = "tokenizer" if kind.__name__ == "AutoTokenizer" else "model"
        raise ConfigError(explain(error, field, source, part)) from None


def from_config(kind: type[T], config: Any) -> Any:
    """kind.from_config(config): a model of that size, without weights of anyone; as above, without foreign code."""
    return kind.from_config(config, trust_remote_code=False)


@contextmanager
def asked_once(source: str) -> Iterator[None]:
    """While a model or dataset is loaded: a hub that cannot be reached is not asked again and again.

    The client tries each file six times, over a minute in all. Then only its cache is looked in.
    """
    if os.path.exists(resolve(source)) or constants.HF_HUB_OFFLINE or reachable(constants.ENDPOINT):
        yield
        return
    switches = [constants, *filter(None, [sys.modules.get("datasets.config")])]
    for module in switches:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module in switches:
            module.HF_HUB_OFFLINE = False


@cache
def reachable(endpoint: str) -> bool:
    """Whether a hub answers at all, within seconds; asked once per process."""
    try:
        get_session().head(endpoint, timeout=PATIENCE)
    except Exception:  # of httpx, by whichever name the client has it
        return False
    return True


def explain(error: Exception, field: str, source: str, kind: str = "model") -> str:
    """One sentence for what transformers, datasets or huggingface_hub raised while `field` was loaded from `source`.

    kind: model, tokenizer (of a model) or dataset.
    """
    local = os.path.exists(resolve(source))
    cause = _cause(error, source, local, kind)
    said = f"{field} = {source!r} could not be loaded{'' if local else ' from the hub'}: {cause}"
    token = get_token()
    return said.replace(token, "<token>") if token else said


def _cause(error: Exception, source: str, local: bool, kind: str) -> str:
    """What the chain of errors tells, and what to do; the surest sign first."""
    chain = list(_chain(error))
    text = "\n".join(map(str, chain))
    instead = "give a local file" if kind == "dataset" else "give a local folder"
    answers = [e for e in chain if isinstance(e, HfHubHTTPError) and not isinstance(e, RemoteEntryNotFoundError)]
    status = answers[0].response.status_code if answers else 0

    # datasets replaces the hub's errors by its own, told apart by their text
    if _any(chain, GatedRepoError) or (_named(chain, "DatasetNotFoundError") and "is a gated dataset" in text):
        page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{source}"
        return f"it is gated: accept its licence on its page, {page}, then {LOG_IN}"
    if _any(chain, RepositoryNotFoundError) or _named(chain, "DatasetNotFoundError"):
        what = "dataset" if kind == "dataset" else "model"
        return f"the hub has no such {what}, or it is private: check the id, {LOG_IN}, or {instead}"
    if status == 401:
        return "the hub refused the token: give HF_TOKEN a valid one, or log in again with `hf auth login`"
    if constants.HF_HUB_OFFLINE and _any(chain, LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError):
        return (
            f"HF_HUB_OFFLINE is set and the cache {constants.HF_HOME} does not have it (or not all of it): unset "
            f"HF_HUB_OFFLINE to download it once, or {instead}"
        )
    if status == 429:
        return f"the hub answered HTTP 429, too many requests: wait some minutes, or {LOG_IN} to be allowed more"
    if status >= 500:
        return f"the hub answered HTTP {status}, an error of its own: try again later"
    if status:
        return f"the hub answered HTTP {status} ({_first_line(answers[0])}): check the id and what HF_TOKEN may read"
    if _named(chain, "RemoteProtocolError") or "Consistency check failed" in text:
        return "the download broke off: start again; the files that are complete are kept"
    if _named(chain, "TransportError") or _any(chain, LocalEntryNotFoundError, ConnectionError):
        return (
            f"{constants.ENDPOINT} cannot be reached, and the cache does not have it: check the connection, proxy and "
            f"HF_ENDPOINT, or {instead}"
        )
    if _named(chain, "SafetensorError"):
        copy = source if local else Path(constants.HF_HUB_CACHE, f"models--{source.replace('/', '--')}")
        return f"its weights are no whole safetensors file ({_first_line(error)}): delete {copy} and get it again"
    if re.search(r"file named [^\n]*model\.safetensors", text):
        return (
            "it has no model.safetensors, and other weights are not read, since a .bin file is a pickle, which can run "
            "code: convert it, or take a model with safetensors"
        )
    if "backend tokenizer" in text or "load tokenizer" in text:
        return f"no tokenizer can be made of its files: it needs a tokenizer.json, or {instead} that has one"
    if "trust_remote_code" in text or "Dataset scripts are no longer supported" in text:
        return f"it needs code from its repository, which is never run here: take another, or {instead}"
    if local and kind != "dataset":
        files = "config.json or tokenizer files" if kind == "tokenizer" else "config.json, or the weights beside it,"
        return f"its {files} cannot be used ({type(error).__name__}: {_first_line(error)}); correct them, or {instead}"
    return f"{_first_line(error)}; check it, or {instead}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what caused it, what was being handled when it was raised, and so on; each once."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__


def _any(chain: list[BaseException], *kinds: type[BaseException]) -> bool:
    return any(isinstance(e, kinds) for e in chain)


def _named(chain: list[BaseException], name: str) -> bool:
    """Whether a class of that name is among them: the HTTP client is httpx or httpx2, datasets is slow to import."""
    return any(name == kind.__name__ for e in chain for kind in type(e).__mro__)


def _first_line(error: BaseException) -> str:
    """The first line of what an error says, and the second where the first announces it."""
    first, *more = (str(error).strip() or type(error).__name__).splitlines()
    return " ".join([first, *map(str.strip, more[: first.endswith(":")])]).rstrip(".")
