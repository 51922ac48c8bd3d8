"""Variants that are wrong, as a newcomer would write them: the check names the fault, or the path is true to them."""

from pathlib import Path

from test_variants import written, wrong_of


def test_registers_in_forward_are_in_every_path(tmp_path: Path) -> None:
    """Where a newcomer would add them; once training had them and sampling did not."""
    found = written(
        tmp_path / "registers.py",
        """
        @variant("forward_registers")
        class Registers(MMDiT):
            def __init__(self, config):
                super().__init__(config)
                self.registers = nn.Parameter(torch.randn(1, 4, config.hidden_size))

            def forward(self, latent, sigma, context, pooled):
                text = self.context_embedder(context)
                text = torch.cat([self.registers.to(text).expand(len(text), -1, -1), text], dim=1)
                return self.flow(latent, self.positions(*self.grid(latent)), text, self.modulations(sigma, pooled))
    """,
    )
    assert wrong_of(found, "sampling is training", "a batch is its singles", "saved and loaded", "every plan") == {}


def test_registers_that_are_no_parameter_are_told(tmp_path: Path) -> None:
    found = written(
        tmp_path / "registers.py",
        """
        @variant("lost_registers")
        class Registers(MMDiT):
            def embed_text(self, context):
                text = self.context_embedder(context)
                return torch.cat([torch.randn(1, 4, text.shape[2]).to(text).expand(len(text), -1, -1), text], dim=1)
    """,
    )
    wrong = {"sampling is training", "saved and loaded", "every plan"}
    assert wrong_of(found, *wrong).keys() == wrong


def test_registers_that_depend_on_the_batch_are_told(tmp_path: Path) -> None:
    found = written(
        tmp_path / "registers.py",
        """
        @variant("batch_registers")
        class Registers(MMDiT):
            def embed_text(self, context):
                text = self.context_embedder(context)
                return text + text.mean(0, keepdim=True)
    """,
    )
    wrong = {"a batch is its singles"}
    assert wrong_of(found, *wrong).keys() == wrong


def test_a_model_that_keeps_what_has_gradients_is_told(tmp_path: Path) -> None:
    """Training copies the model for its average, which PyTorch refuses then."""
    found = written(
        tmp_path / "keeps.py",
        """
        @variant("keeps_the_text")
        class Keeps(MMDiT):
            def embed_text(self, context):
                self.kept = self.context_embedder(context)
                return self.kept
    """,
    )
    (told,) = wrong_of(found, "gradients").values()
    assert "no copy can be made, as training makes them" in told
