"""Samplers for diffusion models, in one set of coordinates: x = x0 + sigma * eps.

denoiser   what everything here consumes: D(x, sigma) = E[x0 | x]; score, classifier-free guidance
schedules  noise levels to step through: 1-D tensors that fall to 0
solvers    euler, heun, ancestral, dpmpp_2m, gaussian_exponential: generators of State; sample drains one
gaussian   Gaussian: denoiser and probability-flow ODE in closed form; moments fits it to a stream of data
skip       how far down a Gaussian may carry a sample, certified (integral: by a network; bound: from data alone)
jump       teleported: a solver that begins there
pipelines  teleport: the same in diffusers pipelines (teleport_scheduler, teleport_checks, and
           what guidance has too: live_scheduler, network_hook)
feynman_kac  weighted particles that sample powers, products and tilts of denoisers' laws exactly (targets,
           weighted_path, particles, resampling); start: where they begin; diagnosis: whether to trust them
guidance   feynman_kac_guidance: corrected guidance in diffusers pipelines (weighing_scheduler, guidance_checks)
prompts    a pipeline's denoiser for a prompt (denoiser_from), its latents' shape and their decoder
mixture    GaussianMixture: exact denoiser and log-density at every noise level
adapters   a diffusers model and its scheduler -> a denoiser
noise      random numbers that belong to a sample, whatever its batch or process
"""

from samplers.adapters import NetworkDenoiser, denoiser_from
from samplers.bound import bound_of
from samplers.denoiser import Denoiser, Guided, score
from samplers.diagnosis import diagnose
from samplers.feynman_kac import FeynmanKacState, draw, feynman_kac
from samplers.gaussian import Gaussian
from samplers.guidance import feynman_kac_guidance
from samplers.jump import teleported
from samplers.mixture import GaussianMixture
from samplers.noise import SampleNoise, normal_like
from samplers.particles import Resampling
from samplers.pipelines import teleport
from samplers.prompts import decode, latent_shape
from samplers.resampling import RESAMPLERS, ess
from samplers.schedules import exponential_sigmas, flow_sigmas, karras_sigmas
from samplers.skip import choose_sigma_skip
from samplers.solvers import (
    SOLVERS,
    Solver,
    State,
    ancestral,
    dpmpp_2m,
    euler,
    gaussian_exponential,
    heun,
    nfe,
    sample,
)
from samplers.start import start_particles
from samplers.targets import Conditioned, Target, annealed, geometric_average, product, reward_tilted
from samplers.weighted_path import Corrector

__all__ = [
    "RESAMPLERS",
    "SOLVERS",
    "Conditioned",
    "Corrector",
    "Denoiser",
    "FeynmanKacState",
    "Gaussian",
    "GaussianMixture",
    "Guided",
    "NetworkDenoiser",
    "Resampling",
    "SampleNoise",
    "Solver",
    "State",
    "Target",
    "ancestral",
    "annealed",
    "bound_of",
    "choose_sigma_skip",
    "decode",
    "denoiser_from",
    "diagnose",
    "dpmpp_2m",
    "draw",
    "ess",
    "euler",
    "exponential_sigmas",
    "feynman_kac",
    "feynman_kac_guidance",
    "flow_sigmas",
    "gaussian_exponential",
    "geometric_average",
    "heun",
    "karras_sigmas",
    "latent_shape",
    "nfe",
    "normal_like",
    "product",
    "reward_tilted",
    "sample",
    "score",
    "start_particles",
    "teleport",
    "teleported",
]
