# %% [markdown]
# # Finding a bias, and correcting it
#
# Two sets of prompts in, the latents that tell them apart out; then exactly those are ablated, on other prompts, and
# what is left of the behaviour is held against ablating random latents. Run `make quickstart` first.

# %%
from gemma_scope_jax import analysis

scope = analysis.open_scope("runs/quickstart")
template = "The {} said that"
women = """woman girl mother sister daughter wife queen lady aunt niece grandmother widow princess actress
duchess nun bride heroine hostess waitress goddess countess mistress stewardess granddaughter stepmother
housewife maiden empress schoolgirl saleswoman policewoman"""
men = """man boy father brother son husband king gentleman uncle nephew grandfather widower prince actor duke monk
groom hero host waiter god count master steward grandson stepfather househusband bachelor emperor schoolboy
salesman policeman"""
women, men = ([template.format(word) for word in words.split()] for words in (women, men))

# %% [markdown]
# The behaviour: after which of them does Gemma go on with " she" rather than " he"?

# %%
asked = (" she", " he")
gap = analysis.behaviour(scope, women, *asked).mean() - analysis.behaviour(scope, men, *asked).mean()
print(f"a gap of {gap:.3f} between the sets")

# %% [markdown]
# On half of the prompts: latents that fire differently, by rank tests whose false discoveries are held to 5 %.

# %%
choosing, measured = analysis.halves(women, men)
found = analysis.contrast(scope, *choosing)
found.show()
found.figure()

# %% [markdown]
# On the other half: the gap with exactly those ablated, and with random sets that fire as strongly.

# %%
corrected = analysis.correct(scope, found, *asked, *measured)
corrected.show()
corrected.figure()
