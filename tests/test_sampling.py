"""The samplers and guidance against closed forms. Run: python -m pytest tests/test_sampling.py"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import eval as evaluation
import sample as sampling_script
from model import Covariance, Probe, Sampling, alpha_sigma, parse_guide, predict, sample
from plumbing.errors import InputError


def gaussian(mean, cov):
    """The ideal v for data N(mean, cov), in closed form."""

    def denoiser(z, x_pref, alpha2, no_prefix):
        alpha = alpha2[0].sqrt()
        sigma = (1 - alpha2[0]).sqrt()
        gain = alpha * cov @ torch.linalg.inv(alpha**2 * cov + sigma**2 * torch.eye(len(mean)))
        x = mean + (z - alpha * mean) @ gain.T
        return (alpha * z - x) / sigma.clamp(min=1e-6)

    return denoiser


def mixture(means, deviation, shares):
    """The ideal v for data that is a mixture of N(mean_k, deviation^2)."""
    means = torch.as_tensor(means)
    shares = torch.as_tensor(shares)

    def denoiser(z, x_pref, alpha2, no_prefix):
        alpha = alpha2[:1].sqrt()
        sigma = (1 - alpha2[:1]).sqrt()
        total = (alpha * deviation) ** 2 + sigma**2
        log_w = shares.log() - (z[:, None] - alpha * means).square().sum(-1) / (2 * total)
        at = means + alpha * deviation**2 / total * (z[:, None] - alpha * means)  # E[x | z, component]
        x = (log_w.softmax(-1)[..., None] * at).sum(1)
        return (alpha * z - x) / sigma.clamp(min=1e-6)

    return denoiser


WAYS = "network", "estimate"  # in which the gradient of a guide comes to z_t
UNIT = Covariance(torch.ones(2), torch.eye(2))  # of N(0, I) in the plane
PAPER = {"sampler": "ddpm", "steps": 250}


def draw(denoiser, n, guides=(), covariance=UNIT, seed=0, **options):
    """n samples in the plane; options: of `Sampling`, whose default sampler and steps hold otherwise."""
    no_prefix = torch.zeros(n, dtype=torch.bool)
    sampling = Sampling(cfg_scale=1, **options)
    generator = torch.Generator().manual_seed(seed)
    return sample(denoiser, torch.zeros(n, 2), no_prefix, sampling, guides, covariance, generator)


@pytest.mark.parametrize(
    "options, share",
    [({}, 0.781), ({"steps": 10}, 0.970), ({"steps": 20}, 0.978), (PAPER, 0.986)],
    ids=["default", "10 steps", "20 steps", "paper"],
)
def test_few_steps_keep_less_of_the_variance(options, share):
    """Of data N(0, I), whose ideal x is alpha z_t. The 4 default steps lose a fifth."""
    x = draw(gaussian(torch.zeros(2), torch.eye(2)), 40_000, **options)
    torch.testing.assert_close(x.mean(0), torch.zeros(2), atol=0.02, rtol=0)
    assert x.var(0).mean().item() == pytest.approx(share, abs=0.015)


def test_the_default_sampler_is_its_recursion_written_out():
    """Algorithm 2 of DPM-Solver++ from -2 to 1 in steps of 1 of lambda = log(alpha / sigma). For data
    N(0, I), x is alpha z.
    """
    z = torch.randn(9, 2, generator=torch.Generator().manual_seed(0))
    before = None
    for half in (-2, -1, 0, 1):
        alpha, sigma = (1 / math.sqrt(1 + math.exp(-2 * sign * half)) for sign in (1, -1))
        alpha_next, sigma_next = (1 / math.sqrt(1 + math.exp(-2 * sign * (half + 1))) for sign in (1, -1))
        x = alpha * z
        ahead = x if before is None else 1.5 * x - 0.5 * before
        z = sigma_next / sigma * z - alpha_next * math.expm1(-1) * ahead
        before = x
    torch.testing.assert_close(draw(gaussian(torch.zeros(2), torch.eye(2)), 9), x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sampler, steps", [("ddpm", 250), ("ddim", 250), ("dpm++", 250), ("dpm++", 20)])
def test_samplers_recover_a_gaussian(sampler, steps):
    """dpm++ begins at log_snr -4 with plain noise, so alpha mean is missing there. At the end that is a share
    alpha sqrt(C / (alpha^2 C + sigma^2)) of the mean, 16 % and 4 % along the axes. The samples are E[x | z_t]
    of the second to last level, which narrows the narrow axis a little.
    """
    mean = torch.tensor([1.0, -0.5])
    cov = torch.tensor([[1.0, 0.6], [0.6, 0.5]])
    x = draw(gaussian(mean, cov), 20_000, sampler=sampler, steps=steps)
    if sampler == "dpm++":
        alpha, sigma = alpha_sigma(torch.tensor(-4.0))
        variance, axes = torch.linalg.eigh(cov)
        mean = mean - axes @ (alpha * (variance / (alpha**2 * variance + sigma**2)).sqrt() * (mean @ axes))
    torch.testing.assert_close(x.mean(0), mean, atol=0.03, rtol=0)
    torch.testing.assert_close(x.T.cov(), cov, atol=0.03, rtol=0)


def log_p_right(x, slope=2.0):
    """A linear probe: log p(right | x) = log sigmoid(slope * x_0)."""
    return F.logsigmoid(slope * x[..., 0])


@pytest.fixture(scope="module", params=WAYS)
def shares(request):
    """Share of samples in the right one of two components, by guidance weight, and the posterior's true
    share.
    """
    means = [[-1.0, 0.0], [1.0, 0.0]]
    deviation = 0.5
    n = 4000
    denoiser = mixture(means, deviation, [0.5, 0.5])
    found = {}
    for weight in (0.0, 0.5, 1.0, 2.0, 5.0):
        guides = [(log_p_right, weight)] if weight else []
        covariance = Covariance(torch.tensor([1.25, 0.25]), torch.eye(2))
        options = {"sampler": "ddpm", "steps": 100, "guide_through": request.param}
        x = draw(denoiser, n, guides, covariance, seed=1, **options)
        found[weight] = (x[:, 0] > 0).float().mean().item()
    x = torch.tensor(means)[torch.arange(n * 50) % 2] + deviation * torch.randn(n * 50, 2)
    p = log_p_right(x).exp()
    return found, (p * (x[:, 0] > 0)).sum().item() / p.sum().item()


def test_guidance_at_weight_one_comes_near_the_posterior(shares):
    """Both stay on the near side: 0.77 of the samples through the network, 0.80 at the estimate, where the
    posterior has 0.85. Through the network, points with sigma / alpha lie further apart than the true
    p(x | z_t) and blunt the gradient; between the components the dx/dz_t of Gaussian data is too flat.
    """
    found, posterior = shares
    assert found[0.0] == pytest.approx(0.5, abs=0.03)
    assert 0.75 < (found[1.0] - 0.5) / (posterior - 0.5) < 1.05


def test_guidance_moves_with_the_weight(shares):
    found = list(shares[0].values())
    assert found == sorted(found) and found[-1] > 0.97


@pytest.mark.parametrize("way", WAYS)
def test_guides_add_and_log_linear_ones_shift_the_mean(way):
    """For p(y | x) = exp(a x), which has no bound but is exact, the posterior of N(0, 1) is N(a, 1)."""
    guides = [(lambda x: x[..., 0], 1.0), (lambda x: -0.5 * x[..., 1], 2.0)]
    options = {"sampler": "ddpm", "steps": 125, "guide_through": way}
    x = draw(gaussian(torch.zeros(2), torch.eye(2)), 8000, guides, **options)
    torch.testing.assert_close(x.mean(0), torch.tensor([1.0, -1.0]), atol=0.05, rtol=0)
    torch.testing.assert_close(x.std(0), torch.ones(2), atol=0.05, rtol=0)


def guided(denoiser, z, log_snr, guides, way, covariance=UNIT, points=32):
    """-> x and eps of one prediction at z (B, 2)."""
    nothing = torch.zeros(len(z), 2), torch.zeros(len(z), dtype=torch.bool)
    sampling = Sampling(cfg_scale=1, guide_through=way)
    rng = torch.Generator().manual_seed(0)
    x, eps = predict(denoiser, z, log_snr.expand(len(z)), *nothing, sampling, guides, covariance, rng, points)
    assert not x.requires_grad and not eps.requires_grad  # no graph grows from step to step
    return x, eps


@pytest.mark.parametrize("way", WAYS)
@given(st.floats(-6, 6), st.floats(0, 10), st.floats(0.01, 10), st.floats(0, 3.2))
def test_a_guided_mean_is_the_posterior_mean_of_gaussian_data(way, log_snr, narrow, wide, angle):
    """Data N(m, C), p(y | x) = exp(a x): E[x | z_t, y] = E[x | z_t] + Cov[x | z_t] a, with
    Cov[x | z_t] = sigma^2 C (alpha^2 C + sigma^2)^-1. Both ways are exact, wherever the axes of C lie.
    """
    z = torch.tensor([[0.3, -0.2]])
    log_snr = torch.tensor([log_snr])
    slope = torch.tensor([1.0, -0.5])
    variances = torch.tensor([narrow, wide])
    angle = torch.tensor(angle)
    axes = torch.stack((angle.cos(), angle.sin(), -angle.sin(), angle.cos())).view(2, 2)
    C = axes * variances @ axes.T
    denoiser = gaussian(torch.tensor([0.5, -1.0]), C)
    guides = [(lambda x: x @ slope, 1.0)]
    x, _ = guided(denoiser, z, log_snr, [], way)
    found, _ = guided(denoiser, z, log_snr, guides, way, Covariance(variances, axes))
    alpha2 = log_snr.sigmoid()
    sigma2 = (-log_snr).sigmoid()
    moved = sigma2 * C @ torch.linalg.inv(alpha2 * C + sigma2 * torch.eye(2)) @ slope
    torch.testing.assert_close(found, x + moved, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("log_snr", [-3.0, 0.0, 2.0])
def test_at_the_estimate_that_holds_for_probes_of_any_shape(log_snr):
    """p(y | x) = exp(-(a x - 1)^2 / 2): the points lie as far apart as Cov[x | z_t] says, along each axis."""
    z = torch.tensor([[0.3, -0.2]])
    log_snr = torch.tensor([log_snr])
    a = torch.tensor([1.0, -0.5])
    variances = torch.tensor([0.1, 5.0])
    axes = torch.tensor([[0.8, -0.6], [0.6, 0.8]])
    C = axes * variances @ axes.T
    denoiser = gaussian(torch.tensor([0.5, -1.0]), C)
    guides = [(lambda x: -((x @ a - 1) ** 2) / 2, 1.0)]
    x, _ = guided(denoiser, z, log_snr, [], "estimate")
    found, _ = guided(denoiser, z, log_snr, guides, "estimate", Covariance(variances, axes), points=200_000)
    alpha2 = log_snr.sigmoid()
    sigma2 = (-log_snr).sigmoid()
    cov = sigma2 * C @ torch.linalg.inv(alpha2 * C + sigma2 * torch.eye(2))
    torch.testing.assert_close(found, x + cov @ a * (1 - x @ a) / (1 + a @ cov @ a), atol=0.02, rtol=0)


@pytest.mark.parametrize("way", WAYS)
def test_guidance_is_the_log_of_the_mean_likelihood(way):
    """At one noise level, against the gradient of log E[p(y | x)] computed with very many points."""
    denoiser = mixture([[-1.0, 0.0], [1.0, 0.0]], 0.5, [0.5, 0.5])
    z = torch.tensor([[0.3, -0.2]])
    log_snr = torch.tensor([0.5])
    _, plain = guided(denoiser, z, log_snr, [], way)
    _, found = guided(denoiser, z, log_snr, [(log_p_right, 3.0)], way, points=200_000)

    z = z.clone().requires_grad_()
    alpha, sigma = alpha_sigma(log_snr)
    x = alpha * z - sigma * denoiser(z, None, log_snr.sigmoid(), None)
    at = torch.linspace(-8, 8, 4001)
    density = torch.exp(-(at**2) / 2)
    deviation = sigma / alpha if way == "network" else sigma
    likelihood = log_p_right(x[0, 0] + deviation[0, 0] * at[:, None]).exp()
    log_p = torch.log((likelihood * density).sum() / density.sum())
    (gradient,) = torch.autograd.grad(log_p, z if way == "network" else x)
    gradient = gradient if way == "network" else alpha * gradient
    torch.testing.assert_close(found, plain - 3 * sigma * gradient, atol=5e-3, rtol=0)


def test_classifier_free_guidance_extrapolates_from_the_null_vector():
    def denoiser(z, x_pref, alpha2, no_prefix):
        return torch.where(no_prefix[:, None], -1.0, x_pref)

    args = (
        torch.zeros(2, 1),
        torch.tensor([0.0, 0.0]),
        torch.tensor([[2.0], [3.0]]),
        torch.tensor([False, True]),
    )
    x, _ = predict(denoiser, *args, Sampling(cfg_scale=2.5), [], None, None)  # x = -sigma v at z = 0
    expected = torch.tensor([[2.5 * 2 - 1.5 * -1], [-1.0]])
    torch.testing.assert_close(x, -math.sqrt(0.5) * expected)


def test_scripts_take_the_defaults_of_sampling():
    for field, value in vars(Sampling()).items():
        assert getattr(sampling_script, field) == getattr(evaluation, field) == value


def probe(name, *classes):
    n = len(classes)
    weights = [20.0 + i for i in range(n)]
    return Probe(name, list(classes), torch.zeros(n, 2), torch.zeros(n), "encoder", weights)


PROBES = [
    probe("sentiment", "negative", "positive"),
    probe("mood", "negative", "calm", "not-calm"),
    probe("topic", "a:b", "sports"),
]


def test_guides_are_read_with_and_without_weights():
    """Without one, it is that of the probe for the class."""
    guides = parse_guide("sentiment=negative : 30, sports,calm:1e-1,not-sports:5,not-calm", PROBES)
    read = [(guide.probe.name, guide.label, guide.away, guide.weight) for guide in guides]
    assert read[:3] == [("sentiment", 0, False, 30.0), ("topic", 1, False, 21.0), ("mood", 1, False, 0.1)]
    assert read[3:] == [("topic", 1, True, 5.0), ("mood", 2, False, 22.0)]  # a class may be called not-calm
    assert parse_guide("not-positive", PROBES)[0].weight == 20.0  # that of negative
    assert parse_guide("none", PROBES) == parse_guide("", PROBES) == []


def test_steering_away_is_towards_all_other_classes():
    """log(1 - p(class))."""
    three = Probe("mood", ["a", "b", "c"], torch.randn(3, 2), torch.randn(3), "encoder", [20.0] * 3)
    e = torch.randn(5, 2)
    (towards,) = parse_guide("b", [three])
    (away,) = parse_guide("not-b", [three])
    torch.testing.assert_close(away.log_prob(e).exp(), 1 - towards.log_prob(e).exp())


def test_a_class_is_looked_up_in_the_probe_that_is_named():
    """Even if another probe has a class called not-sunny."""
    weather = probe("weather", "sunny", "rainy")
    odd = probe("odd", "not-sunny", "fine")
    read = [parse_guide(f"{name}=not-sunny", [weather, odd])[0] for name in ("weather", "odd")]
    assert [(each.probe.name, each.label, each.away) for each in read] == [
        ("weather", 0, True),
        ("odd", 0, False),
    ]
    with pytest.raises(InputError, match="say weather=not-sunny or odd=not-sunny"):
        parse_guide("not-sunny", [weather, odd])


@pytest.mark.parametrize(
    "text, message",
    [
        ("negative", "sentiment=negative or mood=negative"),
        ("sad", "no probe has a class 'sad'"),
        ("sports:-1", "is negative: say not-sports:1"),
        ("not-sports:-1", "is negative: say sports:1"),
        ("sports:", "is not a number"),
        ("sports:nan", "is not a number"),
        ("sports:1e999", "is not a number"),
        (",", "no probe has a class ''"),
    ],
)
def test_a_guide_that_makes_no_sense_is_refused(text, message):
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        parse_guide(text, PROBES)


@given(
    st.text()
    | st.lists(
        st.sampled_from(["sentiment", "negative", "sports", "=", ":", ",", "30", "-", "1e999", " "])
    ).map("".join)
)
def test_no_guide_is_a_traceback(text):
    try:
        assert all(0 <= guide.weight < math.inf for guide in parse_guide(text, PROBES))
    except InputError as e:
        assert str(e).startswith("--guide: ")
