# %% [markdown]
# # What mattered for a prediction
#
# Which latents have a part in what Gemma says next, whether taking them out agrees, and where the answer appears. Run
# `make quickstart` first; with SAEs at many layers, as of `configs/quickstart_banks.py:sites`, the maps have as many
# rows.

# %%
from gemma_scope_jax import analysis

scope = analysis.open_scope("runs/quickstart")
name = next(iter(scope.subjects))
prompt = "Fellow citizens of the Senate and of the House of"

# %% [markdown]
# The parts of latents and of the SAE's error in the logit of one token less that of another: activation times
# gradient.

# %%
parts = analysis.attribute(scope, prompt, answer=" Representatives", against=" Commons")
parts.show(top=8)
parts.figure()

# %% [markdown]
# They add up to what the whole activation has: nothing is left out.

# %%
of = parts.parts[name]
print(f"{of.latents_L.sum() + of.error_L.sum() + of.bias_L.sum():.4f} and {of.total_L.sum():.4f}")

# %% [markdown]
# A gradient is a guess. Each latent taken out for real, against what was attributed to it:

# %%
ablated = analysis.ablations(scope, parts, latents=24)
ablated.show(top=5)
ablated.figure()

# %% [markdown]
# Integrated gradients add up to what the difference of logits gains on their path.

# %%
integrated = analysis.integrate(scope, prompt, name, answer=" Representatives", against=" Commons")
gain = integrated.metric - integrated.integral.baseline
print(f"gain {gain:.4f}, with a gap of {integrated.integral.gap:.1e} at {integrated.integral.nodes} nodes")

# %% [markdown]
# Where in the layers the answer appears, and what is left of it in the SAEs' reconstructions.

# %%
flow = analysis.flow(scope, prompt, answer=" Representatives")
flow.show()
flow.lens.figure()
