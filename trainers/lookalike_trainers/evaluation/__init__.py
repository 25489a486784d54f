"""How good an adapter is: measures, the encoders they need, and DreamBench's protocol."""
