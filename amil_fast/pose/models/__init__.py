"""Networks and losses: backbones, region blocks, generator, discriminator."""
