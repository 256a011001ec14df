"""Losses on features, put to the kit for local losses: all that it asks but what is of logits."""

from torch import nn

from local_distill.testing import loss_test

# They speak of prototypes, of a teacher temperature, or of targets that learn token by token.
OF_LOGITS = (
    "temperatures_must_be_above_zero",
    "the_target_is_the_minimum",
    "one_prototype_costs_nothing",
    "shifts_of_student_logits_do_not_matter",
)


class AsLocal(nn.Module):
    """A loss with ``forward(student, teacher, matches)`` under the signature of a local loss."""

    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, student, teacher, matches, *, teacher_temp, teacher_valid=None):
        return self.loss(student, teacher, matches)


def feature_loss_test(make, *, exclude=()):
    """`loss_test` of ``make(d)``, a loss for features of dimension d."""
    return loss_test(
        lambda d: AsLocal(make(d)), kind="local", exclude=(*OF_LOGITS, *exclude), max_examples=8
    )
