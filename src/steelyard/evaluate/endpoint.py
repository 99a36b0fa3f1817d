"""Questions to a chat endpoint that speaks OpenAI's protocol: waited for, retried, counted, and never asked twice.

Only the standard library. The API key comes from an environment variable and goes into one header: it is part of no
configuration, file or message. Replies are kept in a file as they come, keyed by all that decides them.
"""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import json
import math
import os
import random
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from steelyard.config import Config
from steelyard.errors import InputError
from steelyard.parallel import JobError

Messages = Sequence[Mapping[str, str]]

_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}  # busy, or ill for a moment
_OURS = {400, 413, 422}  # this question cannot be answered; the next one may be
_LONGEST_WAIT = 60.0
_LARGEST_REPLY = 8 << 20
_SHOWN = 300


class JudgeError(JobError):
    """The endpoint could not be made to answer. The message says what it did and what to do."""


class EndpointConfig(Config):
    """A chat endpoint that speaks OpenAI's protocol."""

    url: str | None = Field(None, description="its base, such as http://localhost:8000/v1")
    model: str | None = Field(None, description="name of the model there")
    key_variable: str | None = Field(
        None, description="environment variable that holds the API key; none given: no key is sent"
    )
    temperature: float | None = Field(0.0, ge=0, le=2, description="sampling temperature; none: the server's own")
    max_new_tokens: int = Field(512, ge=8, description="longest reply")
    length_field: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="how the server calls that; newer models of OpenAI want the second"
    )
    concurrency: int = Field(4, ge=1, le=256, description="questions under way at a time")
    timeout: float = Field(120.0, gt=0, description="seconds until a silent server counts as failed")
    retries: int = Field(6, ge=0, description="further attempts after busy servers, faults, time-outs, broken replies")
    backoff: float = Field(1.0, ge=0, description="seconds before the first of them; doubles each time, up to 60")
    max_requests: int | None = Field(None, ge=1, description="send no more requests than this, retries included")

    @model_validator(mode="after")
    def _whole_endpoint(self) -> Self:
        if (self.url is None) != (self.model is None):
            raise ValueError("url and model: give both (an endpoint), or neither")
        if self.url is None:
            if idle := (set(EndpointConfig.model_fields) - {"url", "model"}) & self.given():
                raise ValueError(f"{', '.join(sorted(idle))}: no effect without url and model; leave out, or give them")
            return self
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"url: must look like http://localhost:8000/v1, got {self.url!r}")
        if parts.username or parts.password:
            raise ValueError("url: must hold no user and password, for it is written down; use key_variable")
        if parts.path.rstrip("/").endswith("/completions"):
            raise ValueError(f"url: must end before /chat/completions, got {self.url!r}")
        return self


def read_key(config: EndpointConfig) -> str | None:
    """The API key from its environment variable. Raises InputError if the variable is named, but empty or unusable."""
    if config.key_variable is None:
        return None
    key = os.environ.get(config.key_variable, "").strip()
    if not key:
        raise InputError(
            f"key_variable: the environment variable {config.key_variable} is not set; put the API key there, or leave "
            "key_variable out for a server that wants none"
        )
    if not key.isascii() or not key.isprintable():
        raise InputError(f"key_variable: what {config.key_variable} holds cannot be sent in a header; check the key")
    return key


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected request would carry the key to another server."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class _Stopped(Exception):
    """Another question met with an error that ends all."""


class _Unanswerable(Exception):
    """The server refuses this question, as opposed to all."""


class _Fault(Exception):
    """Worth another attempt; `wait` is how long the server asks for, in seconds."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


class Endpoint:
    """Sends questions. Safe to use from several threads; `stop` ends all waiting."""

    def __init__(self, config: EndpointConfig) -> None:
        if config.url is None:
            raise ValueError("an endpoint needs url and model")
        self.config = config
        self.url = f"{config.url.rstrip('/')}/chat/completions"
        self.stop = threading.Event()
        self.requests = 0
        self.refusal = ""  # what the server last said of a question that it cannot answer
        self._key = read_key(config)
        self._lock = threading.Lock()
        self._opener = urllib.request.build_opener(_NoRedirect)

    def body(self, messages: Messages) -> dict[str, Any]:
        """What is sent. Together with the url it decides the reply, as far as the server is deterministic."""
        body: dict[str, Any] = {"model": self.config.model, "messages": [dict(m) for m in messages]}
        if self.config.temperature is not None:
            body["temperature"] = self.config.temperature
        return body | {self.config.length_field: self.config.max_new_tokens}

    def digest(self, messages: Messages) -> str:
        """Names a question with everything that decides its reply."""
        text = json.dumps([self.url, self.body(messages)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def ask(self, messages: Messages) -> str | None:
        """The reply; None where the server refuses this very question (too long, say).

        Raises JudgeError if the server refuses everything, `retries` are used up, or `max_requests` is reached.
        """
        attempt = 0
        while True:
            self._count()
            try:
                return self._reply(self._send(json.dumps(self.body(messages)).encode()))
            except _Unanswerable:
                return None
            except _Fault as fault:
                attempt += 1
                if attempt > self.config.retries:
                    raise JudgeError(
                        f"{self.url}: no answer after {attempt} attempts, the last one: {fault}; see that the server "
                        "is up (or raise retries, timeout, backoff) and give the same command again: verdicts are kept"
                    ) from None
                wait = self.config.backoff * 2 ** (attempt - 1) * random.uniform(1.0, 1.25)
                if self.stop.wait(min(_LONGEST_WAIT, max(wait, fault.wait or 0.0))):
                    raise _Stopped from None

    def _count(self) -> None:
        with self._lock:
            if self.stop.is_set():
                raise _Stopped
            if self.config.max_requests is not None and self.requests >= self.config.max_requests:
                raise JudgeError(
                    f"max_requests = {self.config.max_requests} are spent; verdicts are kept: give the same command "
                    "again to go on, or raise it"
                )
            self.requests += 1

    def _send(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "steelyard"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url, data=body, headers=headers, method="POST")
        try:
            with self._opener.open(request, timeout=self.config.timeout) as response:
                content: bytes = response.read(_LARGEST_REPLY)
                return content
        except urllib.error.HTTPError as error:
            with error:
                raise self._judge_status(error) from None
        except (OSError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors.
            reason = getattr(error, "reason", None) or error
            raise _Fault(self._clean(f"{type(error).__name__}: {reason}")) from None

    def _judge_status(self, error: urllib.error.HTTPError) -> Exception:
        try:
            said = error.read(_LARGEST_REPLY).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            said = ""
        message = f"status {error.code}: {self._clean(said)}"
        if error.code in _AGAIN:
            return _Fault(message, _seconds(error.headers.get("Retry-After")))
        if error.code in _OURS:
            self.refusal = message
            return _Unanswerable(message)
        if 300 <= error.code < 400:
            return JudgeError(
                f"{self.url}: {message}redirects are not followed, for the key's sake; give the final url"
            )
        advice = {
            401: "check the key (key_variable)",
            403: "check the key (key_variable)",
            404: "check url (it ends before /chat/completions, often in /v1) and model",
        }.get(error.code, "check url and model")
        return JudgeError(f"{self.url}: {message}; {advice}")

    def _reply(self, content: bytes) -> str:
        """The text of the first choice. A reply without text (a refusal of the model) is an empty one."""
        try:
            text = json.loads(content)["choices"][0]["message"].get("content")
            if text is not None and not isinstance(text, str):
                raise TypeError(f"content is of type {type(text).__name__}")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            shown = self._clean(content[:_SHOWN].decode("utf-8", "replace"))
            raise _Fault(f"not a chat completion ({error!r}): {shown!r}") from None
        return self._clean(text or "", whole=True)

    def _clean(self, text: str, *, whole: bool = False) -> str:
        """The text without the key, which some servers repeat; shortened unless `whole`."""
        if self._key is not None:
            text = text.replace(self._key, "(key)")
        return text if whole else " ".join(text.split())[:_SHOWN]


def _seconds(header: str | None) -> float | None:
    """Retry-After in seconds; None if it is absent or a date (then our own waiting time holds)."""
    try:
        seconds = float(header or "")
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


class Replies:
    """A file of replies, one JSON object a line: {"key", "model", "reply"}. One process at a time writes to it."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.known: dict[str, str] = {}
        self._lock = threading.Lock()
        self._file = path.open("a+b")
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"{path}: another process is writing to it; wait for it, or use another folder"
                ) from None
            except OSError:
                pass  # Some cluster file systems have no locks.
            self._read()
        except BaseException:
            self._file.close()
            raise

    def _read(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            self._file.truncate(len(whole))  # A line that a kill cut short; its question is asked again.
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                row = json.loads(line)
                self.known[row["key"]] = str(row["reply"])
            except (ValueError, TypeError, KeyError):
                raise InputError(
                    f"{self.path}:{number}: must be a JSON object with key and reply; restore the file, or remove the "
                    "line (its question is then asked again)"
                ) from None

    def add(self, key: str, model: str, reply: str) -> None:
        """Keep a reply. Safe to use from several threads."""
        line = json.dumps({"key": key, "model": model, "reply": reply}) + "\n"
        with self._lock:
            self._file.write(line.encode("ascii"))
            self._file.flush()
            self.known[key] = reply

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def ask_all(endpoint: Endpoint, questions: Sequence[Messages], replies: Replies) -> list[str | None]:
    """A reply for every question (None where the server refuses that one), known ones without asking.

    Raises InputError before anything is sent if more questions are open than `max_requests`; else as `Endpoint.ask`.
    Replies that came before an error, or an interruption, are kept.
    """
    keys = [endpoint.digest(q) for q in questions]
    wanted = {key: q for key, q in zip(keys, questions, strict=True) if key not in replies.known}
    most = endpoint.config.max_requests
    if most is not None and len(wanted) > most:
        raise InputError(
            f"max_requests: {len(wanted)} questions are open, more than {most}; raise it, or ask less (limit, "
            "per_prompt, against)"
        )

    def work(key: str, question: Messages) -> None:
        try:
            reply = endpoint.ask(question)
        except JudgeError:
            endpoint.stop.set()  # Here, so that this thread begins no further question.
            raise
        except _Stopped:
            return
        if reply is not None:
            replies.add(key, str(endpoint.config.model), reply)

    with ThreadPoolExecutor(endpoint.config.concurrency) as pool:
        futures = [pool.submit(work, key, q) for key, q in wanted.items()]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            endpoint.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [replies.known.get(key) for key in keys]
