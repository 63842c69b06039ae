"""A finished run on the hub."""

from pathlib import Path

from dbcore.config import ConfigError, TrainConfig
from dbcore.engines.run_folder import LORA_FILE
from dbcore.models.embeddings import EMBEDS_NAME

SHARED = [LORA_FILE, EMBEDS_NAME, "README.md", "training.gif", "report/*",
          "validation/*/grid.png"]


def push(config: TrainConfig) -> None:
    """Upload the LoRA and its card, but not config.yaml, which holds this machine's paths.

    The token comes from the login, or from `hub_token`, and is never shown. Raises ConfigError.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=config.hub_token)
    name = config.hub_model_id or Path(config.output_dir).resolve().name
    try:
        url = api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=config.output_dir,
                          commit_message="Trained LoRA", allow_patterns=SHARED)
    except Exception as error:  # noqa: BLE001 - a network fails in many ways, the LoRA is safe in all
        words = str(error).replace(config.hub_token or "\0", "***").splitlines()
        reason = (words or [type(error).__name__])[0]
        raise ConfigError(f"--push_to_hub: {name} could not be uploaded ({reason}); the LoRA is "
                          f"safe in {config.output_dir}. Log in with `hf auth login`, then the "
                          "same command with --resume_from_checkpoint latest uploads it") from None
    print(f"Uploaded to {url}.")
