"""The site's own people and its daemon: one Unix socket a role, each with as few rights as its work needs.

    operator.sock   status, plans, plan, pause, resume
    steward.sock    status, plans, plan, data, reload_data
    officer.sock    status, plans, plan, approve, withdraw, audit_head, accept_record
    each of them    releases, release, budget; the officer's: approve_release, withdraw_release, end_run

Whoever can open a socket has its role: mode 0600, or 0660 for a group of the operating system. An approval needs more
than the socket: the officer's signature. Every call is recorded. The format is local_api.proto.
"""

from __future__ import annotations

import logging
import os
import shutil
import stat
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Annotated, Any, Final, Literal, NoReturn

import grpc
import msgspec
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from fedseek.daemon.audit_lines import Recorder
from fedseek.errors import FedseekError, InvalidConfig, LocalRefused, Malformed, Unreachable
from fedseek.identity.roster import MAX_NAME_CHARS
from fedseek_site.budget import BudgetAsked, RunEnded
from fedseek_site.people import PersonName, PlanApproval, PlanDigest, ReleaseApproval, ReleaseDigest
from fedseek_site.socket_service import bind_private, free_place, grpc_address

Role = Literal["operator", "steward", "officer"]
Json = Mapping[str, Any]

VERSION: Final = 1
SERVICE: Final = "fedseek.site.local.v1.LocalApi"
ROLES: Final[tuple[Role, ...]] = ("operator", "steward", "officer")
ROLE_NAMES: Final[Mapping[Role, str]] = {
    "operator": "operator",
    "steward": "data steward",
    "officer": "privacy officer",
}
MAX_QUESTION_BYTES: Final = 64 << 10
MAX_ANSWER_BYTES: Final = 4 << 20  # a plan and a roster of 1024 sites
MOST_CALLS: Final = 4  # at once, of each role
_log = logging.getLogger(__name__)


class Nothing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A question without fields."""


class PlanAsked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which plan: the first hexadecimal digits of its digest, 12 or more."""

    plan: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{12,64}\Z")]


class Withdrawal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whose approvals of which plan are taken back."""

    plan: PlanDigest
    person: PersonName


class ReleaseAsked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which release: the first hexadecimal digits of its digest, 12 or more."""

    release: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{12,64}\Z")]


class ReleaseWithdrawal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whose approval of which release is taken back."""

    release: ReleaseDigest
    person: PersonName


class RecordAccepted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whose audit record may begin anew, and why: its owner lost the disk, and said so over another channel."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME_CHARS)]
    why: Annotated[str, msgspec.Meta(min_length=1, max_length=1000)]


@dataclass(frozen=True, slots=True)
class LocalApi:
    """What the daemon does for its people. Each returns a JSON object (``bytes`` become base64) or raises one of ours."""

    status: Callable[[], Json]
    plans: Callable[[], Json]
    plan: Callable[[PlanAsked], Json]
    approve: Callable[[PlanApproval], Json]
    withdraw: Callable[[Withdrawal], Json]
    budget: Callable[[BudgetAsked], Json]
    end_run: Callable[[RunEnded], Json]
    releases: Callable[[], Json]
    release: Callable[[ReleaseAsked], Json]
    approve_release: Callable[[ReleaseApproval], Json]
    withdraw_release: Callable[[ReleaseWithdrawal], Json]
    audit_head: Callable[[], Json]
    accept_record: Callable[[RecordAccepted], Json]
    data: Callable[[], Json]
    reload_data: Callable[[], Json]
    pause: Callable[[], Json]
    resume: Callable[[], Json]


@dataclass(frozen=True, slots=True)
class Method:
    """One question: who may ask it, and what it holds."""

    roles: tuple[Role, ...]
    question: type[msgspec.Struct] = Nothing


METHODS: Final[Mapping[str, Method]] = {
    "status": Method(ROLES),
    "plans": Method(ROLES),
    "plan": Method(ROLES, PlanAsked),
    "approve": Method(("officer",), PlanApproval),
    "withdraw": Method(("officer",), Withdrawal),
    "budget": Method(ROLES, BudgetAsked),
    "end_run": Method(("officer",), RunEnded),
    "releases": Method(ROLES),
    "release": Method(ROLES, ReleaseAsked),
    "approve_release": Method(("officer",), ReleaseApproval),
    "withdraw_release": Method(("officer",), ReleaseWithdrawal),
    "audit_head": Method(("officer",)),
    "accept_record": Method(("officer",), RecordAccepted),
    "data": Method(("steward",)),
    "reload_data": Method(("steward",)),
    "pause": Method(("operator",)),
    "resume": Method(("operator",)),
}


def socket_path(run_folder: Path, role: Role) -> Path:
    """Where the socket of a role is."""
    return run_folder / f"{role}.sock"


def rpc_name(method: str) -> str:
    """The name of a method in local_api.proto.

    >>> rpc_name("reload_data")
    'ReloadData'
    """
    return "".join(part.title() for part in method.split("_"))


def serve_local(
    api: LocalApi, run_folder: Path, *, record: Recorder, groups: Mapping[Role, str] | None = None
) -> Callable[[float], None]:
    """Serve the three sockets, in threads of their own. Returns what stops them, given seconds of grace.

    Args:
        api: what is done.
        run_folder: where the sockets are; made if it is missing. With groups, others may pass through it.
        record: told of each call, before anything is done; where it raises, nothing is done.
        groups: operating system group whose members may open the socket of a role; "" or missing: only the daemon's
            own account and root.

    Raises:
        AddressTaken: another process answers there, or the path is no socket, or it is too long.
        InvalidConfig: no such group, or this account may not give files to it.
    """
    groups = {role: group for role, group in (groups or {}).items() if group}
    run_folder.mkdir(mode=0o700, exist_ok=True)
    if groups:
        run_folder.chmod(stat.S_IMODE(run_folder.stat().st_mode) | 0o011)
    with ExitStack() as opened:
        served = []
        for role in ROLES:
            path = socket_path(run_folder, role)
            served.append(_made(_Counter(api, role, record), path))
            opened.callback(_close, served[-1])
            _hand_over(path, groups.get(role))
        for bound in served:
            bound.server.start()
        opened.pop_all()

    def stop(grace: float) -> None:
        for ended in [bound.server.stop(grace) for bound in served]:
            ended.wait()
        for bound in served:
            _close(bound)

    return stop


def ask(
    run_folder: Path, role: Role, method: str, question: msgspec.Struct | None = None, *, timeout: float = 60.0
) -> Any:
    """Ask the daemon whose sockets are in ``run_folder``; the JSON object it answers.

    Raises:
        LocalRefused: it said no; the message is its own.
        Unreachable: nobody answers, or this account may not open the socket.
        Malformed: another version, or no such daemon.
    """
    path = socket_path(run_folder, role)
    body = _Question(version=VERSION, json=msgspec.json.encode(question or Nothing())).SerializeToString()
    with grpc.insecure_channel(grpc_address(path), options=_options(MAX_ANSWER_BYTES)) as channel:
        try:
            data = channel.unary_unary(f"/{SERVICE}/{rpc_name(method)}")(body, timeout=timeout)
        except grpc.RpcError as error:
            raise _as_ours(error, path) from None
    answer = _parse(_Answer, data)
    if answer.code:
        raise LocalRefused(answer.code, answer.message, hint=answer.hint)
    return msgspec.json.decode(answer.json)


def role_for(run_folder: Path, method: str) -> Role:
    """A role that may ask this and whose socket this account may open; else the first that may ask it."""
    may = METHODS[method].roles
    return next((role for role in may if os.access(socket_path(run_folder, role), os.W_OK)), may[0])


class _Counter:
    """Where the people of one role are answered."""

    def __init__(self, api: LocalApi, role: Role, record: Recorder) -> None:
        self._api, self._role, self._record = api, role, record
        self._turn = Lock()
        self._told: Json = {}

    def handlers(self) -> dict[str, Any]:
        """By name in local_api.proto. What the role may not ask is there, too: it is refused by name."""
        return {rpc_name(name): grpc.unary_unary_rpc_method_handler(self._answering(name)) for name in METHODS}

    def _answering(self, name: str) -> Callable[[bytes, grpc.ServicerContext], bytes]:
        method = METHODS[name]

        def answer(data: bytes, context: grpc.ServicerContext) -> bytes:
            if self._role not in method.roles:
                self._deny(name, method, context)
            reply = None
            try:
                reply = self._reply(name, method, data)
            finally:
                if reply is None:
                    _log.exception("the local API failed on %s", name)
                    context.abort(grpc.StatusCode.INTERNAL, "INTERNAL")  # replaces the exception: its text stays here
            return reply

        return answer

    def _deny(self, name: str, method: Method, context: grpc.ServicerContext) -> NoReturn:
        may = " or ".join(f"the {ROLE_NAMES[role]}" for role in method.roles)
        try:
            self._tell({"role": self._role, "method": name, "outcome": "PermissionDenied"})
        finally:
            context.abort(
                grpc.StatusCode.PERMISSION_DENIED,
                f"{name.replace('_', '-')} is for {may}; this is the socket of the {ROLE_NAMES[self._role]}",
            )
        raise AssertionError("abort returns never")

    def _reply(self, name: str, method: Method, data: bytes) -> bytes:
        try:
            answer = _Answer(version=VERSION, json=msgspec.json.encode(self._do(name, method, data)))
        except FedseekError as error:
            _log.warning("%s by the %s is refused: %s", name, ROLE_NAMES[self._role], error)
            answer = _Answer(version=VERSION, code=error.code, message=error.message, hint=error.hint)
        encoded: bytes = answer.SerializeToString()
        return encoded

    def _do(self, name: str, method: Method, data: bytes) -> Json:
        asked = _read(data, method.question)
        call: dict[str, Any] = {"role": self._role, "method": name}
        call |= {field: getattr(asked, field) for field in ("plan", "release", "person") if hasattr(asked, field)}
        self._tell({**call, "outcome": "asked"})
        try:
            done = getattr(self._api, name)
            told: Json = done() if method.question is Nothing else done(asked)
        except FedseekError as error:
            self._tell({**call, "outcome": error.code})
            raise
        return told

    def _tell(self, call: Json) -> None:
        """To the record; a probe that asks the same all day is written down once."""
        with self._turn:
            if call["method"] != "status" or call != self._told:
                self._record("local-call", **call)
                self._told = call


@dataclass(frozen=True, slots=True)
class _Bound:
    """A server on its socket."""

    server: grpc.Server
    threads: ThreadPoolExecutor
    path: Path
    inode: int


def _made(counter: _Counter, path: Path) -> _Bound:
    free_place(path)
    threads = ThreadPoolExecutor(max_workers=MOST_CALLS, thread_name_prefix=path.stem)
    server = grpc.server(
        threads,
        handlers=(grpc.method_handlers_generic_handler(SERVICE, counter.handlers()),),
        options=_options(MAX_QUESTION_BYTES),
        maximum_concurrent_rpcs=MOST_CALLS,
    )
    bind_private(server, path)
    return _Bound(server, threads, path, path.stat().st_ino)


def _close(bound: _Bound) -> None:
    bound.server.stop(0).wait()
    bound.threads.shutdown(wait=False)  # gRPC leaves that to its owner
    if bound.path.exists() and bound.path.stat().st_ino == bound.inode:
        bound.path.unlink(missing_ok=True)


def _hand_over(path: Path, group: str | None) -> None:
    if group is None:
        path.chmod(0o600)
        return
    try:
        shutil.chown(path, group=group)
    except (LookupError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no such group"
        raise InvalidConfig(
            [f"group {group!r} for {path.name}: {reason}"],
            source="sockets",
            hint="the daemon's account must be a member of the group",
        ) from None
    path.chmod(0o660)


def _options(limit: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", limit),
        ("grpc.max_send_message_length", MAX_ANSWER_BYTES),
        ("grpc.so_reuseport", 0),
    ]


def _message_types() -> tuple[Any, Any]:
    """``Question`` and ``Answer`` of local_api.proto, without a compiler or generated code."""
    kinds = descriptor_pb2.FieldDescriptorProto
    texts = [("code", kinds.TYPE_STRING), ("message", kinds.TYPE_STRING), ("hint", kinds.TYPE_STRING)]
    both = [("version", kinds.TYPE_UINT32), ("json", kinds.TYPE_BYTES)]
    file = descriptor_pb2.FileDescriptorProto(name="local_api.proto", package="fedseek.site.local.v1", syntax="proto3")
    for name, fields in (("Question", both), ("Answer", both + texts)):
        message = file.message_type.add(name=name)
        for number, (field, kind) in enumerate(fields, start=1):
            message.field.add(name=field, number=number, type=kind, label=kinds.LABEL_OPTIONAL)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = [pool.FindMessageTypeByName(f"fedseek.site.local.v1.{name}") for name in ("Question", "Answer")]
    return message_factory.GetMessageClass(found[0]), message_factory.GetMessageClass(found[1])


_Question, _Answer = _message_types()


def _parse(kind: Any, data: bytes) -> Any:
    try:
        message = kind.FromString(data)
    except DecodeError:
        raise Malformed(f"local API: not a {kind.DESCRIPTOR.name}") from None
    if message.version != VERSION:
        raise Malformed(f"local API: got version {message.version}, wanted {VERSION}", hint="install the same release")
    return message


def _read(data: bytes, question: type[msgspec.Struct]) -> msgspec.Struct:
    try:
        return msgspec.json.decode(_parse(_Question, data).json, type=question)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Malformed(f"local API: {error}") from None


def _as_ours(error: Any, path: Path) -> FedseekError:
    code = error.code()
    if code is grpc.StatusCode.PERMISSION_DENIED:
        return LocalRefused("PermissionDenied", error.details(), hint="use the socket of that role")
    if code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.RESOURCE_EXHAUSTED):
        return Malformed(f"local API: the daemon could not answer ({code.name})", hint="its log says more")
    return Unreachable(
        f"{path}: nobody answers ({code.name})", hint="is fedseek-site serve running, and may you open it?"
    )
