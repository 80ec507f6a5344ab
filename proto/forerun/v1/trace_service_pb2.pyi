from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WatchRequest(_message.Message):
    __slots__ = ("actors", "request_id")
    ACTORS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    actors: _containers.RepeatedScalarFieldContainer[str]
    request_id: str
    def __init__(self, actors: _Optional[_Iterable[str]] = ..., request_id: _Optional[str] = ...) -> None: ...

class WatchResponse(_message.Message):
    __slots__ = ("events", "num_missed")
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    NUM_MISSED_FIELD_NUMBER: _ClassVar[int]
    events: _containers.RepeatedCompositeFieldContainer[TraceEvent]
    num_missed: int
    def __init__(self, events: _Optional[_Iterable[_Union[TraceEvent, _Mapping]]] = ..., num_missed: _Optional[int] = ...) -> None: ...

class TraceEvent(_message.Message):
    __slots__ = ("span", "counter", "notice", "stage")
    SPAN_FIELD_NUMBER: _ClassVar[int]
    COUNTER_FIELD_NUMBER: _ClassVar[int]
    NOTICE_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    span: Span
    counter: Counter
    notice: Notice
    stage: Stage
    def __init__(self, span: _Optional[_Union[Span, _Mapping]] = ..., counter: _Optional[_Union[Counter, _Mapping]] = ..., notice: _Optional[_Union[Notice, _Mapping]] = ..., stage: _Optional[_Union[Stage, _Mapping]] = ...) -> None: ...

class Span(_message.Message):
    __slots__ = ("actor", "message", "request_id", "round", "enqueued_ns", "started_ns", "finished_ns", "outcome", "computed_ns")
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ENQUEUED_NS_FIELD_NUMBER: _ClassVar[int]
    STARTED_NS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_NS_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_NS_FIELD_NUMBER: _ClassVar[int]
    actor: str
    message: str
    request_id: str
    round: int
    enqueued_ns: int
    started_ns: int
    finished_ns: int
    outcome: str
    computed_ns: int
    def __init__(self, actor: _Optional[str] = ..., message: _Optional[str] = ..., request_id: _Optional[str] = ..., round: _Optional[int] = ..., enqueued_ns: _Optional[int] = ..., started_ns: _Optional[int] = ..., finished_ns: _Optional[int] = ..., outcome: _Optional[str] = ..., computed_ns: _Optional[int] = ...) -> None: ...

class Stage(_message.Message):
    __slots__ = ("request_id", "round", "state", "started_ns", "finished_ns")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    STARTED_NS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_NS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    round: int
    state: str
    started_ns: int
    finished_ns: int
    def __init__(self, request_id: _Optional[str] = ..., round: _Optional[int] = ..., state: _Optional[str] = ..., started_ns: _Optional[int] = ..., finished_ns: _Optional[int] = ...) -> None: ...

class Counter(_message.Message):
    __slots__ = ("name", "request_id", "round", "at_ns", "value")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    AT_NS_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    name: str
    request_id: str
    round: int
    at_ns: int
    value: int
    def __init__(self, name: _Optional[str] = ..., request_id: _Optional[str] = ..., round: _Optional[int] = ..., at_ns: _Optional[int] = ..., value: _Optional[int] = ...) -> None: ...

class Notice(_message.Message):
    __slots__ = ("actor", "at_ns", "text")
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    AT_NS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    actor: str
    at_ns: int
    text: str
    def __init__(self, actor: _Optional[str] = ..., at_ns: _Optional[int] = ..., text: _Optional[str] = ...) -> None: ...
