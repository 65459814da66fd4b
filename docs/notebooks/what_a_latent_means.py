# %% [markdown]
# # What a latent means
#
# Which latents fire on a prompt, what one of them fires on elsewhere, and what Gemma writes with more of it. Run
# `make quickstart` first; each cell shows a figure or prints a table.

# %%
from gemma_scope_jax import analysis

scope = analysis.open_scope("runs/quickstart")
(name,) = scope.subjects

# %% [markdown]
# A prompt as the SAE reads it: tokens across, latents down.

# %%
reading = analysis.read(scope, "The state of the union depends on the strength of our navy and the seas")
reading.figure()

# %% [markdown]
# The latent that fires most on " navy", from near: its strongest passages in text that it was not trained on.

# %%
token = reading.tokens.index(" navy")
((latent, activation),) = reading.strongest(name, token, top=1)
look = analysis.look_at(scope, name, latent, rows=32)
look.show(top=5)
look.figure()

# %% [markdown]
# Is that what it does, too? Gemma as it is beside Gemma with the latent at three times its typical activation.

# %%
typical = look.mean
steered = analysis.steer(scope, "Once upon a time", [analysis.add(name, latent, 3 * typical)], num_tokens=30)
steered.show()

# %% [markdown]
# And what does it cost? Effect on the tokens that the latent raises, against damage to all predictions.

# %%
swept = analysis.sweep(scope, name, latent, strengths=(-2, 0, 1, 2, 4), rows=4, unit=typical)
swept.show()
swept.figure()
