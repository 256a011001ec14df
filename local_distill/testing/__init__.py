"""Test kit for matchers, losses, targets and transforms of your own. It needs the extra `testing`.

One line makes all properties of a matcher pytest tests::

    test_my_matcher = matcher_test(MyMatcher())
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from local_distill._lazy import lazy_names
from local_distill.errors import require_extra

require_extra("hypothesis", "testing")

from local_distill.testing.check_loss import (  # noqa: E402
    check_loss,
    loss_kind,
    loss_properties,
    loss_test,
)
from local_distill.testing.check_matcher import (  # noqa: E402
    check_matcher,
    matcher_kind,
    matcher_properties,
    matcher_test,
)
from local_distill.testing.check_targets import (  # noqa: E402
    check_targets,
    targets_properties,
    targets_test,
)
from local_distill.testing.fault_tables import FaultResult, fault_table  # noqa: E402
from local_distill.testing.loss_faults import (  # noqa: E402
    LossStep,
    LossSubject,
    loss_faults,
)
from local_distill.testing.loss_properties import LossExample  # noqa: E402
from local_distill.testing.matcher_faults import matcher_faults  # noqa: E402
from local_distill.testing.matcher_properties import MatcherExample  # noqa: E402
from local_distill.testing.properties import PropertyFailed  # noqa: E402
from local_distill.testing.same_cells import same_cell_pairs  # noqa: E402
from local_distill.testing.strategies import (  # noqa: E402
    crop_geometries,
    matches,
    token_grids,
    tokens,
    view_pairs,
)
from local_distill.testing.target_faults import target_faults  # noqa: E402
from local_distill.testing.target_properties import TargetsExample  # noqa: E402

if TYPE_CHECKING:
    from local_distill.testing._transform_properties import TransformExample
    from local_distill.testing.transform_kit import (
        check_transform,
        transform_properties,
        transform_test,
    )

__all__ = [
    "FaultResult",
    "LossExample",
    "LossStep",
    "LossSubject",
    "MatcherExample",
    "PropertyFailed",
    "TargetsExample",
    "TransformExample",
    "check_loss",
    "check_matcher",
    "check_targets",
    "check_transform",
    "crop_geometries",
    "fault_table",
    "loss_faults",
    "loss_kind",
    "loss_properties",
    "loss_test",
    "matcher_faults",
    "matcher_kind",
    "matcher_properties",
    "matcher_test",
    "matches",
    "same_cell_pairs",
    "target_faults",
    "targets_properties",
    "targets_test",
    "token_grids",
    "tokens",
    "transform_properties",
    "transform_test",
    "view_pairs",
]

# These need the extra `vision` as well. Their home must not be called as one of them is: once it is
# imported, the package's attribute of that name would be the module.
_LAZY = {
    "TransformExample": "local_distill.testing._transform_properties",
    "check_transform": "local_distill.testing.transform_kit",
    "transform_properties": "local_distill.testing.transform_kit",
    "transform_test": "local_distill.testing.transform_kit",
}

if not TYPE_CHECKING:  # a type checker would take any name for one that is there
    __getattr__ = lazy_names(__name__, _LAZY)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
