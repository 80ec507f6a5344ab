from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetModelInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetModelInfoResponse(_message.Message):
    __slots__ = ("name", "fingerprint", "context_length", "vocabulary_size", "stop_ids", "has_mtp", "has_tokenizer", "has_chat_template")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_SIZE_FIELD_NUMBER: _ClassVar[int]
    STOP_IDS_FIELD_NUMBER: _ClassVar[int]
    HAS_MTP_FIELD_NUMBER: _ClassVar[int]
    HAS_TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    HAS_CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    name: str
    fingerprint: str
    context_length: int
    vocabulary_size: int
    stop_ids: _containers.RepeatedScalarFieldContainer[int]
    has_mtp: bool
    has_tokenizer: bool
    has_chat_template: bool
    def __init__(self, name: _Optional[str] = ..., fingerprint: _Optional[str] = ..., context_length: _Optional[int] = ..., vocabulary_size: _Optional[int] = ..., stop_ids: _Optional[_Iterable[int]] = ..., has_mtp: _Optional[bool] = ..., has_tokenizer: _Optional[bool] = ..., has_chat_template: _Optional[bool] = ...) -> None: ...

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("version", "started_at_seconds", "drafters", "event_loop", "num_slots")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DRAFTERS_FIELD_NUMBER: _ClassVar[int]
    EVENT_LOOP_FIELD_NUMBER: _ClassVar[int]
    NUM_SLOTS_FIELD_NUMBER: _ClassVar[int]
    version: str
    started_at_seconds: float
    drafters: _containers.RepeatedScalarFieldContainer[str]
    event_loop: str
    num_slots: int
    def __init__(self, version: _Optional[str] = ..., started_at_seconds: _Optional[float] = ..., drafters: _Optional[_Iterable[str]] = ..., event_loop: _Optional[str] = ..., num_slots: _Optional[int] = ...) -> None: ...

class GetLoadsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetLoadsResponse(_message.Message):
    __slots__ = ("num_requests_running", "num_requests_waiting", "num_slots_used", "num_slots", "num_pages_used", "num_pages", "num_preemptions", "actors")
    NUM_REQUESTS_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_REQUESTS_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_SLOTS_USED_FIELD_NUMBER: _ClassVar[int]
    NUM_SLOTS_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_USED_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    NUM_PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    ACTORS_FIELD_NUMBER: _ClassVar[int]
    num_requests_running: int
    num_requests_waiting: int
    num_slots_used: int
    num_slots: int
    num_pages_used: int
    num_pages: int
    num_preemptions: int
    actors: _containers.RepeatedCompositeFieldContainer[ActorLoad]
    def __init__(self, num_requests_running: _Optional[int] = ..., num_requests_waiting: _Optional[int] = ..., num_slots_used: _Optional[int] = ..., num_slots: _Optional[int] = ..., num_pages_used: _Optional[int] = ..., num_pages: _Optional[int] = ..., num_preemptions: _Optional[int] = ..., actors: _Optional[_Iterable[_Union[ActorLoad, _Mapping]]] = ...) -> None: ...

class ActorLoad(_message.Message):
    __slots__ = ("actor", "num_waiting", "num_received", "num_restarts", "is_switched_off")
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    NUM_RESTARTS_FIELD_NUMBER: _ClassVar[int]
    IS_SWITCHED_OFF_FIELD_NUMBER: _ClassVar[int]
    actor: str
    num_waiting: int
    num_received: int
    num_restarts: int
    is_switched_off: bool
    def __init__(self, actor: _Optional[str] = ..., num_waiting: _Optional[int] = ..., num_received: _Optional[int] = ..., num_restarts: _Optional[int] = ..., is_switched_off: _Optional[bool] = ...) -> None: ...
