"""Explains in words the measures of a report: what each one is, and what it should be."""

from __future__ import annotations

from typing import NamedTuple


class Measure(NamedTuple):
    """Explains a measure of metrics.json.

    Attributes:
        label: its name in tables, of at most 48 characters.
        meaning: a sentence that says what it is.
        aim: a sentence that says what it should be; empty where it should be nothing in particular.

    Example:
        >>> from kdejsd.runs.measures import explained
        >>> explained("jsd").label
        'JSD of the codes, nats'
    """

    label: str
    meaning: str = ""
    aim: str = ""


_OF_CODES = {
    "reconstruction_error": Measure(
        "reconstruction error, mean squared",
        "The mean squared error between an example and what is decoded from its code.",
        "Lower is better. If it is far higher for held-out examples, the model has learnt training examples by heart.",
    ),
    "variance_explained": Measure(
        "variance explained by what is decoded",
        "The share of the variance of all columns together that the reconstructions explain: 1 - (mean squared "
        "error) / variance, as the model sees the columns.",
        "Near 1. At 0 the mean of each column would do as well.",
    ),
    "variance_explained_least": Measure(
        "  of the column explained least",
        "The same share, for the column where it is lowest; a column that has one value only is left out.",
        "Near 1. The table of the columns below says which one it is.",
    ),
    "latent_term": Measure(
        "latent loss, nats",
        "The term of the training loss that draws the codes to their target.",
        "Near the value of the next row. That is not 0, because the density of finitely many lagged codes differs from "
        "the distribution that they come from. It has gaps, where it is far below the target's density. So the loss "
        "can be negative.",
    ),
    "latent_term_of_target": Measure(
        "  of codes that follow the target",
        "The mean of the same loss for codes that follow the target, at this bandwidth and number of lagged codes.",
        "The value to compare with: the loss of codes that are too narrow is above it.",
    ),
    "gradient_weight": Measure(
        "weight of the latent gradient, 1 - r",
        "The mean over the codes of p_target / (p_codes + p_target), the factor in the gradient of the latent loss.",
        "0.5 where the codes follow the target. Near 0 nothing draws the codes to it any more (the dead zone).",
    ),
    "jsd": Measure(
        "JSD of the codes, nats",
        "The Jensen-Shannon divergence between the density of the codes and the target: 0 for equal distributions, "
        "log 2 = 0.69 for distributions that do not overlap.",
        "Near the value of the target's own samples, in the next row. It can lie a little below that value or below 0, "
        "since both are estimates from finitely many samples. A value far below it means codes that are too narrow; "
        "look at their variance.",
    ),
    "jsd_of_target": Measure(
        "  of as many samples of the target",
        "The same divergence, of as many samples of the target itself.",
        "The value to compare with: codes that follow the target have it, apart from chance.",
    ),
    "entropy": Measure(
        "entropy of whitened codes, nats",
        "The entropy of the codes after a linear map to mean 0 and covariance 1; it does not see a wrong mean or "
        "covariance.",
        "For a normal target, as high as that of normal samples, which have the highest entropy. It can lie a little "
        "above, since both are estimates.",
    ),
    "entropy_of_normal": Measure(
        "  of as many normal samples",
        "The entropy of as many samples of the standard normal, estimated in the same way.",
        "The value to compare with: the estimates of both have the same bias.",
    ),
    "variance": Measure(
        "variance of the codes",
        "The variance of each dimension of the codes.",
        "The variance that the loss aims at, in the next row.",
    ),
    "expected_variance": Measure(
        "  that the loss aims at",
        "The variance of each dimension for which the loss is the lowest.",
    ),
    "mean": Measure("mean of the codes", "The mean of each dimension of the codes.", "The target's mean."),
    "covariance_eigenvalues": Measure(
        "eigenvalues of the codes' covariance",
        "The variances of the codes along their principal directions.",
        "For a standard normal target all near 1; one near 0 means that the codes lie on a surface.",
    ),
    "matched_jsd": Measure(
        "JSD by a kernel for all models, nats",
        "The divergence of the codes by a kernel that depends only on the target and the number of codes. It compares "
        "models of every kind.",
        "As for the JSD above.",
    ),
    "matched_jsd_of_target": Measure(
        "  of as many samples of the target",
        "The same divergence, of as many samples of the target itself.",
        "The value to compare with: codes that follow the target have it, apart from chance.",
    ),
}

MEASURES = {
    "count": Measure("examples", "The number of examples that were measured."),
    **_OF_CODES,
    **{
        f"posterior.{key}": Measure(*(text.replace("codes", "posterior samples") for text in measure))
        for key, measure in _OF_CODES.items()
    },
    "divergence": Measure(
        "divergence by the discriminator",
        "How far generated examples are from these, as the model's own discriminator tells them apart.",
        "Lower is better. It is higher for training examples if the discriminator has learnt them by heart.",
    ),
    "samples.count": Measure("number", "The number of generated samples that were measured."),
    "samples.modes_captured": Measure(
        "modes captured",
        "The number of modes of the data that a generated sample of high quality comes from.",
        "All of them.",
    ),
    "samples.high_quality_share": Measure(
        "share of high quality",
        "The share of the generated samples within three standard deviations of a mode.",
        "0.989, which the data's own samples have.",
    ),
    "samples.reverse_kl": Measure(
        "reverse KL, nats",
        "The Kullback-Leibler divergence of the shares of the generated samples in the modes from equal shares.",
        "Near 0.",
    ),
    "samples.sliced_wasserstein": Measure(
        "sliced Wasserstein distance",
        "How far the generated examples must be moved, in the mean over random directions, to become held-out ones; in "
        "the units that the model sees, which are standard deviations where the columns are standardised.",
        "Near the value of the next row. That is not 0, because two finite sets of one distribution differ by chance.",
    ),
    "samples.sliced_wasserstein_of_training": Measure(
        "  of as many training examples",
        "The same distance, of training examples from the held-out ones.",
        "The value to compare with.",
    ),
    "samples.two_sample_accuracy": Measure(
        "two-sample accuracy",
        "The share of generated and held-out examples that a classifier puts into the right one of the two sets. The "
        "classifier was trained on other examples of both.",
        "Near 0.5, where the classifier cannot tell generated from held-out examples; 1 says that it always can.",
    ),
    "samples.two_sample_accuracy_of_training": Measure(
        "  of as many training examples",
        "The same share, of training examples and held-out ones.",
        "The value to compare with. It is near 0.5 if training and held-out examples have one distribution.",
    ),
    "samples.two_sample_standard_error": Measure(
        "  standard error without difference",
        "The standard deviation of the accuracy if both sets have one distribution.",
    ),
    "samples.two_sample_count": Measure(
        "  number compared", "The number of examples of each set that were compared for the distance and the accuracy."
    ),
    "diversity.num_samples": Measure(
        "number of samples", "The number of latent samples whose examples a classifier has put into classes."
    ),
    "diversity.prior": Measure(
        "distribution of the latents", "The distribution that the latent samples were drawn from."
    ),
    "diversity.probabilities": Measure(
        "class probabilities", "The share of the generated examples in each class.", "As in the training examples."
    ),
    "diversity.collision_entropy": Measure(
        "collision entropy, nats",
        "Minus the logarithm of the probability that two generated examples are of one class.",
        "Higher is more diverse; the logarithm of the number of classes is the most.",
    ),
    "diversity.collision_entropy_interval": Measure(
        "  its interval", "The interval in which the collision entropy lies with the confidence of the next row."
    ),
    "diversity.confidence": Measure("  confidence of the interval", "The confidence of the interval above."),
    "diversity.class_radius.mean": Measure(
        "mean class radius",
        "The mean distance from a latent sample to the nearest point of another class.",
        "Lower goes with more diversity; the bounds below say how large it can be.",
    ),
    "diversity.class_radius.standard_error": Measure(
        "  its standard error", "The standard error of the mean class radius."
    ),
    "diversity.class_radius.method": Measure(
        "  how it was found", "By the nearest sample of another class, or by a search along the classifier's gradient."
    ),
    "diversity.class_radius.num_samples": Measure("  number of samples", "The samples whose radius was measured."),
    "diversity.class_radius.num_without_boundary": Measure(
        "  samples without another class", "The samples around which no other class was found.", "0."
    ),
    "diversity.radius_bound": Measure(
        "  at most, at these class probabilities", "The largest radius that classes of these probabilities can have."
    ),
    "diversity.collision_bound": Measure(
        "  at most, at this collision entropy", "The largest radius that this collision entropy allows."
    ),
    "diversity.uniform_bound": Measure(
        "  at most, for equal classes", "The largest radius that as many classes of equal probability can have."
    ),
    "diversity.max_collision_entropy": Measure(
        "collision entropy at most, at this radius", "The highest collision entropy that the mean class radius allows."
    ),
    "diversity.holes.mass": Measure(
        "latent holes, share of the prior",
        "The share of the prior in regions with hardly any codes: their density there is below its quantile (at the "
        "level below) among held-out codes.",
        "That level where the codes follow the prior; more where they leave parts of it empty.",
    ),
    "diversity.holes.standard_error": Measure("  its standard error", "The standard error of the share."),
    "diversity.holes.level": Measure(
        "  level", "The level of the quantile, which is the share for codes that follow the prior."
    ),
    "diversity.holes.bandwidth": Measure("  bandwidth", "The bandwidth of the density of the codes."),
    "diversity.holes.num_codes": Measure("  number of codes", "The codes that the holes were looked for in."),
    "run.epochs": Measure("epochs", "The epochs that were begun."),
    "run.steps": Measure("steps", "The training steps."),
    "run.seed": Measure("seed", "The seed of the run, with which the command repeats it."),
    "run.wall_time_s": Measure(
        "wall time, s", "The seconds that the training took; of a run that was resumed, its last part."
    ),
    "run.latent_time_share": Measure(
        "share of the step for the latent loss",
        "The share of a training step's time that the latent loss takes, with the refresh of the lagged codes.",
        "Lower costs less.",
    ),
}


def explained(key: str) -> Measure:
    """Returns the words for a measure by its place in metrics.json.

    The place goes without "held_out" and "training". A measure without an explanation here, such as one of a data set
    of your own, has its key as its label.
    """
    label = key.rpartition(".")[2].replace("_", " ")
    return MEASURES.get(key, Measure(label))
