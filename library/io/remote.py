"""Storage behind URLs: S3 through obstore, every other scheme through the fsspec package that knows it.

Connections are opened when they are first needed, once in each process, and serve all of its threads.
"""

import configparser
import contextlib
import errno
import functools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from library.config.messages import holds_secret, without_secrets

_LONGEST_REASON = 300
_STAMPS = ("ETag", "etag", "e_tag", "md5Hash", "generation", "LastModified", "last_modified", "mtime", "updated")
"""What fsspec's file systems call the thing that changes when a file does, the most reliable first."""

_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_OTHER_CREDENTIALS = (
    "AWS_SKIP_SIGNATURE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
_NO_CREDENTIALS = (
    "no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for a public bucket"
)


class RemoteFile(NamedTuple):
    """A file of a listing: its name in the listed folder, its size, and a mark of its content (empty: unknown)."""

    name: str
    bytes: int
    version: str


class Storage(Protocol):
    """Files under keys. Every method raises OSError with a reason of one line."""

    def list(self, folder: str, *, recursive: bool) -> Iterable[RemoteFile]:
        """The files in a folder, in any order."""

    def read(self, key: str, begin: int | None = None, length: int | None = None) -> bytes:
        """A file's bytes, or a part of them, which is shorter where the file ends."""

    def write(self, key: str, data: bytes) -> None:
        """This puts a file in place; missing folders are made."""

    def remove(self, key: str) -> None:
        """This removes a file, which need not exist."""

    def exists(self, key: str) -> bool:
        """Whether there is a file or a folder."""


def storage_of(url: str) -> tuple[Storage, str]:
    """The storage of a URL, and the URL's key in it.

    Raises:
        OSError: The scheme is unknown, or its package isn't installed.
    """
    if holds_secret(url):
        raise OSError(
            errno.EINVAL,
            "the address has a login or a signature in it, which would be written into caches and logs; give them in "
            "environment variables or in the storage's own configuration",
        )
    scheme, _, rest = url.partition("://")
    host, _, key = rest.partition("/")
    return _open(scheme.lower(), host, os.getpid()), key


def start_method() -> str | None:
    """How child processes that read remote files must start: ``spawn``, or None: any way will do.

    obstore's threads don't survive a fork: once this process has used them, a forked child would wait for them for
    ever.
    """
    return "spawn" if _process_of_threads.cache_info().currsize else None


@functools.lru_cache(maxsize=64)
def _open(scheme: str, host: str, process: int) -> Storage:
    return _Bucket(host) if scheme == "s3" else _FileSystem(scheme, host)


@functools.lru_cache(maxsize=1)
def _process_of_threads() -> int:
    """The process in which obstore was first used."""
    return os.getpid()


class _Bucket:
    """An S3 bucket."""

    def __init__(self, name: str):
        try:
            from obstore.store import S3Store
        except ImportError:
            raise OSError(errno.ENOSYS, "s3:// needs the package obstore: pip install obstore") from None
        if _process_of_threads() != os.getpid():
            raise OSError(
                errno.EDEADLK, "this process was forked from one that has opened buckets; start it by spawn instead"
            )
        self._root = f"s3://{name}/"
        with _readable(self._root):
            self._store = S3Store(name, **s3_settings(os.environ))

    def list(self, folder: str, *, recursive: bool) -> Iterator[RemoteFile]:
        prefix = folder.rstrip("/")
        skipped = len(prefix) + 1 if prefix else 0
        with _readable(self._root + folder):
            chunks: Iterable[Iterable[Mapping[str, Any]]]
            if recursive:
                chunks = self._store.list(prefix or None, chunk_size=1000)
            else:
                chunks = [self._store.list_with_delimiter(prefix or None)["objects"]]
            for entry in (entry for chunk in chunks for entry in chunk):
                version = entry["e_tag"] or str(entry["last_modified"] or "")
                yield RemoteFile(entry["path"][skipped:], entry["size"], version)

    def read(self, key: str, begin: int | None = None, length: int | None = None) -> bytes:
        with _readable(self._root + key):
            if begin is None or length is None:
                return self._store.get(key).bytes().to_bytes()
            return self._store.get_range(key, start=begin, length=length).to_bytes()

    def write(self, key: str, data: bytes) -> None:
        with _readable(self._root + key):
            self._store.put(key, data)

    def remove(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError), _readable(self._root + key):
            self._store.delete(key)

    def exists(self, key: str) -> bool:
        try:
            with _readable(self._root + key):
                self._store.head(key)
            return True
        except FileNotFoundError:
            pass
        try:
            return next(self.list(key, recursive=True), None) is not None
        except FileNotFoundError:  # no such bucket
            return False


class _FileSystem:
    """A file system of fsspec."""

    def __init__(self, scheme: str, host: str):
        from fsspec.core import url_to_fs
        from fsspec.registry import known_implementations

        self._root = f"{scheme}://{host}/"
        try:
            self._files = url_to_fs(self._root)[0]
        except ImportError as error:
            hint = known_implementations.get(scheme, {}).get("err") or str(error)
            raise OSError(errno.ENOSYS, f"{scheme}:// needs another package: {_one_line(hint)}") from None
        except ValueError as error:
            if "Protocol not known" in str(error):
                raise OSError(errno.EPROTONOSUPPORT, f"nothing is known about addresses with {scheme}://") from None
            raise OSError(errno.EINVAL, _one_line(error)) from error
        except Exception as error:
            raise _as_os_error(error, self._root) from error

    def list(self, folder: str, *, recursive: bool) -> Iterator[RemoteFile]:
        path = self._root + folder.rstrip("/")
        with _readable(path):
            self._files.invalidate_cache()
            skipped = len(self._files._strip_protocol(path).rstrip("/")) + 1
            found = self._files.find(path, maxdepth=None if recursive else 1, detail=True)
            with ThreadPoolExecutor(16) as pool:  # servers of plain files tell nothing but names in a listing
                for entry in pool.map(self._complete, found.values()):
                    version = next((str(entry[stamp]) for stamp in (*_STAMPS, "created") if entry.get(stamp)), "")
                    yield RemoteFile(entry["name"][skipped:], entry["size"] or 0, version)

    def _complete(self, entry: dict[str, Any]) -> dict[str, Any]:
        if entry.get("size") is not None:
            return entry
        return {**entry, **self._files.info(entry["name"]), "name": entry["name"]}

    def read(self, key: str, begin: int | None = None, length: int | None = None) -> bytes:
        with _readable(self._root + key):
            end = None if begin is None or length is None else begin + length
            return bytes(self._files.cat_file(self._root + key, start=begin, end=end))

    def write(self, key: str, data: bytes) -> None:
        path = self._root + key
        with _readable(path):
            try:
                self._files.pipe_file(path, data)
            except FileNotFoundError:  # only some storages make folders on their own
                self._files.makedirs(self._files._parent(path), exist_ok=True)
                self._files.pipe_file(path, data)

    def remove(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError), _readable(self._root + key):
            self._files.rm_file(self._root + key)

    def exists(self, key: str) -> bool:
        with _readable(self._root + key):
            return bool(self._files.exists(self._root + key))


def s3_settings(environment: Mapping[str, str]) -> dict[str, Any]:
    """What obstore is told beyond what it finds in the environment itself.

    That is: plain http for an endpoint that is one, and the profile that the AWS tools keep in the home folder.
    """
    settings: dict[str, Any] = {}
    profile = {} if environment.get("AWS_ACCESS_KEY_ID") else _profile(environment)
    known = "aws_access_key_id" in profile or environment.get("AWS_ACCESS_KEY_ID")
    settings |= {key: value for key, value in profile.items() if key.startswith("aws_")}
    if "region" in profile and not (environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")):
        settings["aws_region"] = profile["region"]
    named = (environment.get(name) for name in _ENDPOINTS)
    endpoint = next((value for value in named if value), profile.get("endpoint_url"))
    if endpoint is not None:
        settings["aws_endpoint"] = endpoint
    client: dict[str, Any] = {"timeout": "300s"}  # for a whole file, not only its beginning
    if endpoint is not None and endpoint.startswith("http://"):
        client["allow_http"] = True
    settings["client_options"] = client
    if not known and not any(environment.get(name) for name in _OTHER_CREDENTIALS):
        settings["retry_config"] = {"max_retries": 2}  # only a machine in Amazon's cloud answers, and it does at once
    return settings


def _profile(environment: Mapping[str, str]) -> dict[str, str]:
    """The values of ``AWS_PROFILE`` (or of the default profile) in the files that the AWS tools write."""
    name = environment.get("AWS_PROFILE") or "default"
    home = Path("~/.aws").expanduser()
    values: dict[str, str] = {}
    for file, section in (
        (environment.get("AWS_CONFIG_FILE") or home / "config", name if name == "default" else f"profile {name}"),
        (environment.get("AWS_SHARED_CREDENTIALS_FILE") or home / "credentials", name),
    ):
        parser = configparser.RawConfigParser()
        try:
            parser.read(file, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError) as error:
            line = getattr(error, "lineno", None)  # its text quotes the line, which may be a key
            where = f", line {line}" if line else ""
            raise OSError(errno.EINVAL, f"{file}{where}: not of the form that the AWS tools write") from None
        if parser.has_section(section):
            values |= dict(parser.items(section))
    wanted = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token", "region", "endpoint_url")
    return {key: value for key, value in values.items() if key in wanted}


@contextlib.contextmanager
def _readable(path: str) -> Iterator[None]:
    """This turns whatever a storage raises into an OSError of one line."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.strerror and "\n" not in error.strerror:
            raise
        raise _as_os_error(error, path) from error


def _as_os_error(error: Exception, path: str) -> OSError:
    text = without_secrets(str(error))
    code, message = re.search(r"<Code>(.*?)</Code>", text), re.search(r"<Message>(.*?)</Message>", text, re.DOTALL)
    if code is not None and code[1] == "NoSuchBucket":
        return OSError(errno.ENOENT, "no such bucket", path)
    if isinstance(error, FileNotFoundError):
        return OSError(errno.ENOENT, "no such file", path)
    if "169.254.169.254" in text:
        return OSError(errno.EACCES, _NO_CREDENTIALS, path)
    if "error sending request" in text:
        address = re.search(r"https?://[^/\s]+", text)
        return OSError(errno.EHOSTUNREACH, f"no answer from {address[0] if address else 'the server'}", path)
    if code is not None:
        said = f"{_one_line(message[1])} ({code[1]})" if message else code[1]
        return OSError(errno.EACCES if "403" in text else errno.EIO, said, path)
    if "403 Forbidden" in text or "401 Unauthorized" in text:
        return OSError(errno.EACCES, "access denied; check the credentials in the environment", path)
    return OSError(errno.EIO, _one_line(text).removeprefix("Generic S3 error: ") or type(error).__name__, path)


def _one_line(text: object) -> str:
    """The first paragraph, on one line; what follows are a library's own notes."""
    line = " ".join(without_secrets(str(text)).strip().split("\n\n")[0].split())
    return line if len(line) <= _LONGEST_REASON else f"{line[:_LONGEST_REASON]} ..."
