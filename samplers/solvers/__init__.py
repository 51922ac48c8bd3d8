"""Solvers of the flow d x / d sigma = velocity(x, sigma), by the names that users give them."""

from samplers.flow import Solver
from samplers.solvers.adams import deis, lms
from samplers.solvers.exponential import dpmpp_2m, res_multistep, unipc
from samplers.solvers.onestep import euler, euler_ancestral, heun
from samplers.solvers.stochastic import dpmpp_2m_sde, dpmpp_3m_sde

SOLVERS: dict[str, Solver] = {
    "euler": euler,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde(),
    "dpmpp_3m_sde": dpmpp_3m_sde(),
    "euler_ancestral": euler_ancestral(),
    "unipc": unipc,
    "deis": deis,
    "lms": lms,
    "res_multistep": res_multistep,
}
