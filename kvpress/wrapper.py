"""A method replaced on one instance, so that removing it leaves no trace and copying it copies none."""

import functools
from typing import Any


class Wrapper:
    """A callable that stands on an instance in the place of one of its methods until it is removed.

    It lets calls through unchanged once it is removed, since others may have wrapped it meanwhile. A copy of the instance
    (`copy.deepcopy`, `pickle`, `torch.save`) gets what it stands for: a copy of a patched model is an unpatched one.

    Args:
        owner: the instance.
        name: the method's name.
    """

    def __init__(self, owner: Any, name: str) -> None:
        self.inner = getattr(owner, name)
        self._name, self._own = name, name in vars(owner)  # whether somebody had put something there before
        self.active = True
        functools.update_wrapper(self, self.inner)
        vars(owner)[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)

    def remove(self, owner: Any) -> None:
        """Put back what was there; what somebody set in the meantime stays."""
        self.active = False
        if vars(owner).get(self._name) is not self:
            return
        if self._own:
            vars(owner)[self._name] = self.inner
        else:
            del vars(owner)[self._name]

    def __reduce__(self) -> Any:
        return _itself, (self.inner,)


def _itself(thing: Any) -> Any:
    return thing
