"""An image classifier with batch normalization under schedule-free AdamW, evaluated at its average.

python examples/image_classifier.py
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

import heavyball


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    epochs = parser.parse_args().epochs
    torch.manual_seed(0)
    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    images = images.float().div(16).view(-1, 1, 8, 8)
    order = torch.randperm(len(images))
    train, test = order[:-400], order[-400:]
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 9, 10)),
    )
    opt = heavyball.create(model, "SFAdamW", lr=0.01, no_decay="auto", weight_decay=0.01)
    for epoch in range(1, epochs + 1):
        model.train()
        for batch in train[torch.randperm(len(train))].split(64):
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            opt.zero_grad()
            loss.backward()
            opt.step()
        with opt.averaged(), torch.no_grad():
            for batch in train.split(64)[:10]:  # batch norm statistics at the average
                model(images[batch])
            model.eval()
            right = (model(images[test]).argmax(1) == labels[test]).float().mean().item()
        print(f"epoch {epoch:2d}  loss {loss.item():.3f}  accuracy {right:.3f}")
    print("nine of ten are right:", right > 0.9)


if __name__ == "__main__":
    main()
