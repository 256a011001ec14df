"""Joint clusterings against their truth."""

import torch


def check_clusters(found, wanted, tolerance):
    """Both sides' `Clusters` against [image] of (student, teacher) assignments."""
    for image, sides in enumerate(wanted):
        valid = [
            all(any(row[j] > 0 for row in side) for side in sides)
            for j in range(found[0].valid.shape[1])
        ]
        for clusters, side in zip(found, sides, strict=True):
            torch.testing.assert_close(
                clusters.assignment[image].double(),
                torch.tensor(side, dtype=torch.float64).reshape(clusters.assignment.shape[1:]),
                rtol=0,
                atol=tolerance,
            )
            assert clusters.valid[image].tolist() == valid
