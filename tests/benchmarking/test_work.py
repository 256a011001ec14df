"""What a question takes by formula, against what torch counts and what tensors weigh."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from local_distill import NearestMatcher, match_views
from local_distill.benchmarking.plain_forms import (
    match_by_table,
    plain_local_loss,
    plain_similarities,
)
from local_distill.benchmarking.sizes import Size, step
from local_distill.benchmarking.work import (
    loss_from_logits_work,
    loss_from_prototypes_work,
    nearest_work,
    prototype_product_flops,
    similarity_product_flops,
    similarity_work,
)

SMALL = Size(5, 2, 12, 40, 16)
BATCH = 3


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_similarity_products_are_what_torch_counts():
    made = step(SMALL, BATCH)
    flops = similarity_product_flops(made, BATCH)
    assert flops == counted(lambda: match_by_table(plain_similarities, made))
    assert flops == 2 * BATCH * 12 * (2 * 25 * 25 + 16 * 4 * 25)


def rows_of(made):
    student = sum(view.num_tokens for view in made.student)
    teacher = sum(view.num_tokens for view in made.teacher)
    answered = sum(made.student[v].num_tokens for v, _ in made.pairs)
    return BATCH * student, BATCH * teacher, BATCH * answered


def test_loss_products_are_what_torch_counts():
    made, c, d = step(SMALL, BATCH), 17, 6
    matches = match_views(NearestMatcher(), made.student, made.teacher, made.pairs)
    student = [torch.randn(BATCH, view.num_tokens, d, requires_grad=True) for view in made.student]
    teacher = [torch.randn(BATCH, view.num_tokens, d) for view in made.teacher]
    weight, teacher_weight = torch.randn(c, d, requires_grad=True), torch.randn(c, d)

    def run():
        logits = [z @ weight.T for z in student], [x @ teacher_weight.T for x in teacher]
        torch.autograd.grad(plain_local_loss(*logits, matches, 0.1, 0.04), [*student, weight])

    student_rows, teacher_rows, answered = rows_of(made)
    products = prototype_product_flops(student_rows, teacher_rows, c, d)
    assert products == counted(run)
    work = loss_from_prototypes_work(student_rows, teacher_rows, answered, c, d, torch.float32)
    from_logits = loss_from_logits_work(student_rows, teacher_rows, answered, c, torch.float32)
    assert work.flops == products + from_logits.flops
    read = [*student, *teacher, weight, teacher_weight]
    assert work.bytes == sum(part.nbytes for part in [*read, *student, weight])


def test_bytes_of_matching_are_what_goes_in_and_what_comes_out():
    made = step(SMALL, BATCH)
    found = match_views(NearestMatcher(), made.student, made.teacher, made.pairs)
    out = sum(part.numel() * part.itemsize for matches in found.values() for part in matches)
    views = [*made.student, *made.teacher]
    places = sum(part.nbytes for view in views for part in view.geometry)
    features = sum(view.features.nbytes for view in views)
    assert nearest_work(made, BATCH).bytes == places + out
    assert similarity_work(made, BATCH).bytes == features + out


def test_bytes_of_the_loss_from_logits():
    made = step(SMALL, BATCH)
    student_rows, teacher_rows, answered = rows_of(made)
    logits = torch.empty(student_rows, 17, dtype=torch.bfloat16)
    targets = torch.empty(teacher_rows, 17, dtype=torch.bfloat16)
    work = loss_from_logits_work(student_rows, teacher_rows, answered, 17, torch.bfloat16)
    assert work.bytes == 2 * logits.nbytes + targets.nbytes
    assert work.flops == 17 * (5 * (student_rows + teacher_rows) + 3 * answered)


def test_the_closed_form_is_linear_in_tokens():
    few, many = (nearest_work(step(Size(n, n, 1), 1), 1).flops for n in (4, 8))
    assert many == 4 * few
