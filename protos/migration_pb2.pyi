from protos import generate_pb2 as _generate_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Peer(_message.Message):
    __slots__ = ("protocol", "instance_id", "incarnation")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    instance_id: str
    incarnation: str
    def __init__(self, protocol: _Optional[int] = ..., instance_id: _Optional[str] = ..., incarnation: _Optional[str] = ...) -> None: ...

class Offer(_message.Message):
    __slots__ = ("attempt", "request_id", "epoch", "home", "model", "submit", "num_blocks")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    HOME_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    attempt: str
    request_id: str
    epoch: int
    home: str
    model: _generate_pb2.Model
    submit: _generate_pb2.Submit
    num_blocks: int
    def __init__(self, attempt: _Optional[str] = ..., request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., home: _Optional[str] = ..., model: _Optional[_Union[_generate_pb2.Model, _Mapping]] = ..., submit: _Optional[_Union[_generate_pb2.Submit, _Mapping]] = ..., num_blocks: _Optional[int] = ...) -> None: ...

class Announce(_message.Message):
    __slots__ = ("attempt", "num_blocks")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    attempt: str
    num_blocks: int
    def __init__(self, attempt: _Optional[str] = ..., num_blocks: _Optional[int] = ...) -> None: ...

class Extend(_message.Message):
    __slots__ = ("attempt", "num_blocks")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    attempt: str
    num_blocks: int
    def __init__(self, attempt: _Optional[str] = ..., num_blocks: _Optional[int] = ...) -> None: ...

class Handover(_message.Message):
    __slots__ = ("attempt", "request_id", "epoch", "output", "num_computed", "num_blocks", "acked", "num_stages", "cached_tokens", "logprobs", "charged")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    NUM_COMPUTED_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    ACKED_FIELD_NUMBER: _ClassVar[int]
    NUM_STAGES_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    CHARGED_FIELD_NUMBER: _ClassVar[int]
    attempt: str
    request_id: str
    epoch: int
    output: _containers.RepeatedScalarFieldContainer[int]
    num_computed: int
    num_blocks: int
    acked: int
    num_stages: int
    cached_tokens: int
    logprobs: _containers.RepeatedCompositeFieldContainer[_generate_pb2.TokenLogprobs]
    charged: _generate_pb2.Charged
    def __init__(self, attempt: _Optional[str] = ..., request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., output: _Optional[_Iterable[int]] = ..., num_computed: _Optional[int] = ..., num_blocks: _Optional[int] = ..., acked: _Optional[int] = ..., num_stages: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., logprobs: _Optional[_Iterable[_Union[_generate_pb2.TokenLogprobs, _Mapping]]] = ..., charged: _Optional[_Union[_generate_pb2.Charged, _Mapping]] = ...) -> None: ...

class CancelMigration(_message.Message):
    __slots__ = ("attempt", "reason")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    attempt: str
    reason: str
    def __init__(self, attempt: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class ToDestination(_message.Message):
    __slots__ = ("hello", "offer", "extend", "announce", "handover", "cancel")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    EXTEND_FIELD_NUMBER: _ClassVar[int]
    ANNOUNCE_FIELD_NUMBER: _ClassVar[int]
    HANDOVER_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    hello: Peer
    offer: Offer
    extend: Extend
    announce: Announce
    handover: Handover
    cancel: CancelMigration
    def __init__(self, hello: _Optional[_Union[Peer, _Mapping]] = ..., offer: _Optional[_Union[Offer, _Mapping]] = ..., extend: _Optional[_Union[Extend, _Mapping]] = ..., announce: _Optional[_Union[Announce, _Mapping]] = ..., handover: _Optional[_Union[Handover, _Mapping]] = ..., cancel: _Optional[_Union[CancelMigration, _Mapping]] = ...) -> None: ...

class Accept(_message.Message):
    __slots__ = ("attempt", "cached_blocks")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    CACHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    attempt: str
    cached_blocks: int
    def __init__(self, attempt: _Optional[str] = ..., cached_blocks: _Optional[int] = ...) -> None: ...

class Refuse(_message.Message):
    __slots__ = ("attempt", "reason")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    attempt: str
    reason: str
    def __init__(self, attempt: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class Extended(_message.Message):
    __slots__ = ("attempt", "num_blocks")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    attempt: str
    num_blocks: int
    def __init__(self, attempt: _Optional[str] = ..., num_blocks: _Optional[int] = ...) -> None: ...

class Released(_message.Message):
    __slots__ = ("attempt",)
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    attempt: str
    def __init__(self, attempt: _Optional[str] = ...) -> None: ...

class ToSource(_message.Message):
    __slots__ = ("hello", "accept", "refuse", "extended", "released", "cancel")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    ACCEPT_FIELD_NUMBER: _ClassVar[int]
    REFUSE_FIELD_NUMBER: _ClassVar[int]
    EXTENDED_FIELD_NUMBER: _ClassVar[int]
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    hello: Peer
    accept: Accept
    refuse: Refuse
    extended: Extended
    released: Released
    cancel: CancelMigration
    def __init__(self, hello: _Optional[_Union[Peer, _Mapping]] = ..., accept: _Optional[_Union[Accept, _Mapping]] = ..., refuse: _Optional[_Union[Refuse, _Mapping]] = ..., extended: _Optional[_Union[Extended, _Mapping]] = ..., released: _Optional[_Union[Released, _Mapping]] = ..., cancel: _Optional[_Union[CancelMigration, _Mapping]] = ...) -> None: ...

class KvChunk(_message.Message):
    __slots__ = ("attempt", "stage", "shard", "block", "offset", "data", "last")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    attempt: str
    stage: int
    shard: int
    block: int
    offset: int
    data: bytes
    last: bool
    def __init__(self, attempt: _Optional[str] = ..., stage: _Optional[int] = ..., shard: _Optional[int] = ..., block: _Optional[int] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ..., last: bool = ...) -> None: ...

class CopyReply(_message.Message):
    __slots__ = ("attempt", "stage", "written")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_FIELD_NUMBER: _ClassVar[int]
    attempt: str
    stage: int
    written: bool
    def __init__(self, attempt: _Optional[str] = ..., stage: _Optional[int] = ..., written: bool = ...) -> None: ...
