from forerun.v1 import generation_service_pb2 as _generation_service_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SaveStateRequest(_message.Message):
    __slots__ = ("request_id", "name")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    name: str
    def __init__(self, request_id: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class SaveStateResponse(_message.Message):
    __slots__ = ("num_bytes",)
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    num_bytes: int
    def __init__(self, num_bytes: _Optional[int] = ...) -> None: ...

class LoadStateRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class LoadStateResponse(_message.Message):
    __slots__ = ("started", "delta", "finished")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    started: _generation_service_pb2.Started
    delta: _generation_service_pb2.Delta
    finished: _generation_service_pb2.Finished
    def __init__(self, started: _Optional[_Union[_generation_service_pb2.Started, _Mapping]] = ..., delta: _Optional[_Union[_generation_service_pb2.Delta, _Mapping]] = ..., finished: _Optional[_Union[_generation_service_pb2.Finished, _Mapping]] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ProfileRequest(_message.Message):
    __slots__ = ("seconds",)
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    seconds: float
    def __init__(self, seconds: _Optional[float] = ...) -> None: ...

class ProfileResponse(_message.Message):
    __slots__ = ("entries", "num_missed")
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    NUM_MISSED_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[ProfileEntry]
    num_missed: int
    def __init__(self, entries: _Optional[_Iterable[_Union[ProfileEntry, _Mapping]]] = ..., num_missed: _Optional[int] = ...) -> None: ...

class ProfileEntry(_message.Message):
    __slots__ = ("actor", "message", "count", "queued_seconds", "handled_seconds", "longest_seconds")
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    QUEUED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    HANDLED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    LONGEST_SECONDS_FIELD_NUMBER: _ClassVar[int]
    actor: str
    message: str
    count: int
    queued_seconds: float
    handled_seconds: float
    longest_seconds: float
    def __init__(self, actor: _Optional[str] = ..., message: _Optional[str] = ..., count: _Optional[int] = ..., queued_seconds: _Optional[float] = ..., handled_seconds: _Optional[float] = ..., longest_seconds: _Optional[float] = ...) -> None: ...
