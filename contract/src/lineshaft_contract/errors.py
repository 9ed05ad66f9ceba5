"""Every error that lineshaft raises on purpose, in one tree.

Catch `LineshaftError` to catch them all. Each message says what was given, what is allowed and what to do;
the command line prints it on one line and exits with status 2, unless a command documents another.

```
LineshaftError
├── ConfigError                     the configuration (file, environment, command line) is wrong
│   ├── UnknownKey                  a key that no model knows; carries the nearest match
│   └── InvalidValue                a known key with an ill-typed or out-of-range value
├── BackendError                    choosing or starting a backend
│   ├── UnknownBackend              no plugin registers this name; carries the nearest names
│   ├── BackendUnavailable          registered, but not usable on this machine; carries the reason
│   ├── AmbiguousBackend            `backend = "auto"` and several are equally good
│   └── PluginError                 a plugin breaks the contract (wrong type, wrong API version)
├── PlanError                       choosing kernels
│   ├── Unsupported                 no kernel takes a problem; carries every reason
│   ├── Ambiguous                   several kernels are equally good; prints the line that settles it
│   └── PlanMismatch                two ranks resolved different plans
├── ModelError                      finding and reading a model
│   ├── ModelNotFound               the reference leads nowhere
│   ├── UnknownArchitecture         no model family registers this architecture
│   ├── CorruptCheckpoint           a file is truncated or not what it says it is
│   ├── MissingTensor               the checkpoint lacks a tensor that the model needs
│   ├── MisshapenTensor             a tensor has another shape or dtype than the model needs
│   └── TokenizerError              the tokenizer cannot be built or fails
├── RequestError                    one request is wrong; the engine and all others go on
│   ├── EmptyPrompt                 a prompt without a token
│   ├── PromptTooLong               longer than the model's context or than the KV pool holds
│   ├── TokenOutOfRange             a token id outside the vocabulary
│   ├── ChatError                   messages or tools are malformed, or the chat template is missing or refuses them
│   └── InvalidSamplingParams       a sampling parameter that means nothing (temperature NaN, max_tokens <= 0, ...)
│       └── InvalidStructure        a schema, expression or grammar of a structured output that cannot be used
├── ResourceError                   the machine is too small
│   ├── OutOfMemory                 weights, caches or workspaces do not fit; says by how much
│   └── PoolTooSmall                the KV pool cannot hold even one request of the configured length
├── LayoutError                     parallel degrees break a rule; lists every broken rule at once
├── WorkerDied                      a worker process ended or stopped answering
├── SessionError                    a call that the session's state forbids
│   ├── SessionClosed               any call after `close`
│   ├── SessionFrozen               `capture`, `load` or `alloc_caches` between `freeze` and `thaw`
│   └── SessionPoisoned             a program failed after it had consumed its caches
├── ContractViolation               a model's forward or a kernel breaks the op contract
└── IntegrityError                  the cache manager's books do not balance: a bug, please report it
```
"""

from __future__ import annotations


class LineshaftError(Exception):
    """Base of all errors that lineshaft raises on purpose. `status` is the exit status of the command line."""

    status = 2


class ConfigError(LineshaftError):
    """The configuration (file, environment, command line) is wrong."""


class UnknownKey(ConfigError):
    """A configuration key that nothing knows."""


class InvalidValue(ConfigError):
    """A known configuration key with an ill-typed or out-of-range value."""


class BackendError(LineshaftError):
    """A backend cannot be chosen or started."""


class UnknownBackend(BackendError):
    """No installed plugin registers a backend of this name."""


class BackendUnavailable(BackendError):
    """The backend is registered but cannot be used on this machine."""


class AmbiguousBackend(BackendError):
    """`backend = "auto"` and several usable backends are equally good."""


class PluginError(BackendError):
    """A plugin breaks the contract: a wrong type, a missing attribute, an API version that is not accepted."""


class PlanError(LineshaftError):
    """Kernels cannot be chosen."""


class Unsupported(PlanError):
    """No kernel of the backend takes a problem; the message lists each kernel's reason."""


class Ambiguous(PlanError):
    """Several kernels are equally good; the message prints the configuration line that settles it."""


class PlanMismatch(PlanError):
    """Two ranks resolved different plans."""


class ModelError(LineshaftError):
    """A model cannot be found or read."""


class ModelNotFound(ModelError):
    """A model reference leads nowhere."""


class UnknownArchitecture(ModelError):
    """No model family registers the checkpoint's architecture."""


class CorruptCheckpoint(ModelError):
    """A checkpoint file is truncated or is not what it says it is."""


class MissingTensor(ModelError):
    """The checkpoint lacks a tensor that the model needs."""


class MisshapenTensor(ModelError):
    """A checkpoint tensor has another shape or dtype than the model needs."""


class TokenizerError(ModelError):
    """A tokenizer cannot be built, or fails on its input."""


class RequestError(LineshaftError):
    """One request is wrong; the engine and every other request go on."""


class EmptyPrompt(RequestError):
    """A prompt without a token."""


class PromptTooLong(RequestError):
    """A prompt longer than the model's context or than the KV pool holds."""


class TokenOutOfRange(RequestError):
    """A token id, of a prompt or of a teacher, outside the vocabulary."""


class ChatError(RequestError):
    """Messages or tools are malformed, or the chat template is missing, broken or refuses them."""


class InvalidSamplingParams(RequestError):
    """A sampling parameter that means nothing."""


class InvalidStructure(InvalidSamplingParams):
    """A JSON schema, regular expression or grammar of a structured output that is wrong, or too large to follow."""


class ResourceError(LineshaftError):
    """The machine is too small for what was asked."""


class OutOfMemory(ResourceError):
    """Weights, caches or workspaces do not fit in memory."""


class PoolTooSmall(ResourceError):
    """The KV pool cannot hold even one request of the configured length."""


class LayoutError(LineshaftError):
    """Parallel degrees break one or more rules; the message lists all of them."""


class WorkerDied(LineshaftError):
    """A worker process ended or stopped answering."""


class SessionError(LineshaftError):
    """A call that the session's state forbids."""


class SessionClosed(SessionError):
    """Any call on a session after `close`."""


class SessionFrozen(SessionError):
    """A call that would trace or compile between `freeze` and `thaw`."""


class SessionPoisoned(SessionError):
    """A program failed after it had consumed its caches, or a step was interrupted; the session must be rebuilt."""


class ContractViolation(LineshaftError):
    """A model's forward, or a kernel, breaks the op contract."""


class IntegrityError(LineshaftError):
    """The cache manager's books do not balance."""
