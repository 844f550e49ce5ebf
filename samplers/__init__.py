"""Samplers for diffusion models, in one set of coordinates: x = x0 + sigma * eps.

denoiser   what everything here consumes: D(x, sigma) = E[x0 | x]; score, classifier-free guidance
schedules  noise levels to step through: 1-D tensors that fall to 0
solvers    euler, heun, ancestral, dpmpp_2m: generators of State; sample drains one
mixture    GaussianMixture: exact denoiser and log-density at every noise level
adapters   a diffusers model and its scheduler -> a denoiser
noise      random numbers that belong to a sample, whatever its batch or process
"""

from samplers.adapters import NetworkDenoiser, denoiser_from
from samplers.denoiser import Denoiser, Guided, score
from samplers.mixture import GaussianMixture
from samplers.noise import SampleNoise, normal_like
from samplers.schedules import exponential_sigmas, flow_sigmas, karras_sigmas
from samplers.solvers import SOLVERS, Solver, State, ancestral, dpmpp_2m, euler, heun, nfe, sample

__all__ = [
    "SOLVERS",
    "Denoiser",
    "GaussianMixture",
    "Guided",
    "NetworkDenoiser",
    "SampleNoise",
    "Solver",
    "State",
    "ancestral",
    "denoiser_from",
    "dpmpp_2m",
    "euler",
    "exponential_sigmas",
    "flow_sigmas",
    "heun",
    "karras_sigmas",
    "nfe",
    "normal_like",
    "sample",
    "score",
]
