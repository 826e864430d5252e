"""A small vision-language model of our own: SmolLM2-135M that learnt to see drawings and print."""
