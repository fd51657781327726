"""The solvers of diffusers, k-diffusion and azula, each as `run(network, start, sigmas) -> x_0` in PyTorch."""

import importlib
import types

import numpy as np


def diffusers_runs(library):
    """{name: run(network, x, sigmas)} of diffusers' schedulers, their sigmas replaced by the grid's."""
    import torch

    importlib.import_module("diffusers").logging.set_verbosity_error()
    table = dict(trained_betas=np.full(1000, 1e-3), num_train_timesteps=1000)

    def loop(make, scaled, output):
        def run(network, x, sigmas):
            scheduler, sigmas = make(len(sigmas)), torch.tensor(sigmas)
            if "Heun" in type(scheduler).__name__:
                sigmas = torch.cat([sigmas[:1], sigmas[1:].repeat_interleave(2)])
            scale = (1 + sigmas**2) ** -0.5 if scaled else torch.ones_like(sigmas)
            scheduler.sigmas = torch.cat([sigmas, torch.zeros(1)])
            if hasattr(scheduler, "betas") and "IPNDM" in type(scheduler).__name__:
                scheduler.alphas, scheduler.betas = scale, sigmas * scale
            scheduler.set_begin_index(0)
            x = x * scale[0]
            for i, t in enumerate(scheduler.timesteps[: len(sigmas) - 1]):
                x0 = network(x / scale[i], sigmas[i])
                x = scheduler.step(output(x / scale[i], x0, sigmas[i]), t, x).prev_sample
            return network(x / scale[-1], sigmas[-1])

        return run

    def started(name, **options):
        def make(n):
            scheduler = getattr(library, f"{name}Scheduler")(**options)
            scheduler.set_timesteps(n)
            return scheduler

        return make

    def data(x, x0, sigma):
        return x0

    def noise(x, x0, sigma):
        return (x - x0) / sigma

    def velocity(x, x0, sigma):
        return ((x - x0) / sigma - sigma * x0) / (1 + sigma**2) ** 0.5

    def edm(x, x0, sigma):  # sigma_data = 1
        return (x0 - x / (1 + sigma**2)) * (1 + sigma**2) ** 0.5 / sigma

    runs = {}
    for k in (1, 2, 3):
        for kind in ("midpoint", "heun") if k == 2 else ("midpoint",):
            for algorithm in ("dpmsolver++", "dpmsolver"):
                end = "zero" if algorithm == "dpmsolver++" else "sigma_min"
                same = dict(solver_order=k, solver_type=kind, algorithm_type=algorithm, final_sigmas_type=end)
                for name in ("DPMSolverMultistep", "DPMSolverSinglestep"):
                    for lower in (True, False) if name == "DPMSolverMultistep" else (True,):
                        make = started(name, prediction_type="sample", lower_order_final=lower, **same, **table)
                        runs[f"{name}({k}, {kind}, {algorithm}, lower_order_final={lower})"] = loop(make, True, data)
            make = started("EDMDPMSolverMultistep", solver_order=k, solver_type=kind, sigma_data=1.0)
            runs[f"EDMDPMSolverMultistep({k}, {kind})"] = loop(make, False, edm)
        for kind in ("bh1", "bh2"):
            for x0 in (True, False):
                same = dict(solver_order=k, solver_type=kind, predict_x0=x0, prediction_type="sample")
                runs[f"UniPC({k}, {kind}, {'x0' if x0 else 'eps'})"] = loop(
                    started("UniPCMultistep", **same, **table), True, data
                )
        make = started("DEISMultistep", solver_order=k, prediction_type="sample", **table)
        runs[f"DEISMultistep({k})"] = loop(make, True, data)
        same = dict(predictor_order=k, corrector_order=k, tau_func=lambda t: 0, prediction_type="sample")
        runs[f"SASolver({k}, {k}, tau=0)"] = loop(started("SASolver", **same, **table), True, data)
    for name in ("EulerDiscrete", "HeunDiscrete", "LMSDiscrete"):
        runs[name] = loop(started(name, **table), False, noise)
    runs["EDMEuler"] = loop(started("EDMEuler", sigma_data=1.0), False, edm)
    runs["IPNDM"] = loop(started("IPNDM"), True, velocity)
    return runs


def k_diffusion_runs(sampling):
    """{name: run(network, x, sigmas)} of k-diffusion's samplers, without noise."""
    import torch

    def still(*_):
        return 0.0

    def loop(sampler, **options):
        def run(network, x, sigmas):
            sigmas = torch.tensor(sigmas)
            x = sampler(lambda x, sigma: network(x, sigma[0]), x, sigmas, disable=True, **options)
            return network(x, sigmas[-1])

        return run

    def fast(network, x, sigmas):
        def model(x, sigma):
            return network(x, sigma[0])

        x = sampling.sample_dpm_fast(model, x, float(sigmas[-1]), float(sigmas[0]), len(sigmas) - 1, disable=True)
        return network(x, torch.tensor(sigmas[-1]))

    runs = {f"lms({k})": loop(sampling.sample_lms, order=k) for k in (2, 3, 4)} | {"dpm_fast": fast}
    for name in ("euler", "heun", "dpm_2", "dpmpp_2m"):
        runs[name] = loop(getattr(sampling, f"sample_{name}"))
    for name in ("dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde"):
        runs[f"{name}(eta=0)"] = loop(getattr(sampling, f"sample_{name}"), eta=0.0, noise_sampler=still)
    runs["dpmpp_2m_sde(eta=0, heun)"] = loop(
        sampling.sample_dpmpp_2m_sde, eta=0.0, noise_sampler=still, solver_type="heun"
    )
    return runs


def azula_runs(sample):
    """{name: run(network, x, sigmas)} of azula's samplers, on a schedule that is the grid."""
    import torch

    def loop(name, **options):
        def run(network, x, sigmas):
            last, sigmas = len(sigmas) - 1, torch.tensor(sigmas)

            class Denoiser:
                def schedule(self, t):
                    sigma = sigmas[((1 - t) * last).round().long()]
                    return torch.ones_like(sigma), sigma

                def __call__(self, x, t):
                    return types.SimpleNamespace(mean=network(x, self.schedule(t)[1]))

            sampler = getattr(sample, f"{name}Sampler")(Denoiser(), steps=last, silent=True, **options)
            return network(sampler(x), sigmas[-1])

        return run

    runs = {name: loop(name) for name in ("Euler", "Heun")}
    for name in ("zAB", "vAB", "zEAB", "xEAB", "REAB"):
        runs |= {f"{name}({k})": loop(name, order=k) for k in (2, 3, 4)}
    return runs
